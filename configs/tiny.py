"""Embedded default: a policy of a million parameters learns when to search, on a laptop's CPU.

    python -m mmsr1_jax.scripts.tiny_world
    python -m mmsr1_jax.train --config=configs/tiny.py

--config=configs/tiny.py                    GRPO on the tiny world's questions
--config=configs/tiny.py:warm_start         for `sft`: first stage of training the initial policy
--config=configs/tiny.py:warm_start_facts   for `sft`: second stage, which memorises facts
"""

from mmsr1_jax.config import (
    Buckets,
    Config,
    ConfigError,
    Data,
    Eval,
    Images,
    Mesh,
    Model,
    Objective,
    Rewards,
    Rollout,
    Run,
    Tools,
    Turns,
    Update,
)
from mmsr1_jax.data import tiny_world

WORLD = "build/tiny_world"  # default output directory of `mmsr1_jax.scripts.tiny_world`


def get_config(variant: str = "grpo") -> Config:
    if variant not in ("grpo", "warm_start", "warm_start_facts"):
        raise ConfigError(f"configs/tiny.py:{variant}: use :grpo, :warm_start or :warm_start_facts")
    config = Config(
        model=Model(
            dtype="float32",  # bfloat16 is slower than float32 on a CPU
            attention="xla",  # rows are short
        ),
        mesh=Mesh(replica=1, fsdp=-1, tensor=1),
        buckets=Buckets(
            lengths=(128, 256, 512, 1024),
            image_windows=(1, 4, 16),  # one bucket fits a photo, another a search result's image
            batch_tokens=2048,
            batch_windows=32,
        ),
        images=Images(
            min_pixels=56 * 56,
            max_pixels=84 * 84,  # a photo is 9 tokens
        ),
        rollout=Rollout(
            lanes=64,  # twice decode_batch_size: tools run while other lanes decode
            decode_batch_size=32,
            decode_steps=8,  # a turn has about ten tokens
            prefill_buckets=(16, 32, 64, 128),
            prefill_tokens=256,
            encode_windows=16,
            image_cache_tokens=8192,
        ),
        turns=Turns(
            max_new_tokens=48,  # the longest sensible turn has 16
            max_episode_tokens=512,
            min_turn_tokens=32,
            max_result_tokens=256,
            prompt_dir=str(tiny_world.PROMPTS),
        ),
        tools=Tools(
            index=f"{WORLD}/index",
            max_results=2,  # this year's page and the outdated one
            max_result_chars=300,
            max_pixels=56 * 56,  # 4 tokens
        ),
        data=Data(
            train=(f"{WORLD}/train.parquet",),
        ),
        eval=Eval(data=(f"{WORLD}/heldout.parquet", f"{WORLD}/unmet.parquet")),
        rewards=Rewards(
            per_search_penalty=True,  # prefer one search to two if one is enough
            # The warm-started policy still gets one in fifteen of its remembered facts wrong. With
            # the published penalty of 0.1, a search would therefore pay off nearly everywhere.
            search_penalty=0.3,
        ),
        objective=Objective(
            kl_coef=0.0,  # rules decide correctness, and cannot be hacked
            # Without it, a seed may stop trying to answer some landmarks from memory: its groups
            # then all search, and have no advantage to learn from (docs/results.md).
            entropy_coef=0.01,
        ),
        update=Update(
            pack_length=512,  # short rows, because attention covers a whole row
            pack_windows=3,  # the fewest that leave as many rows; the tower computes padding too
            micro_batch_rows=2,
            learning_rate=3e-4,
            weight_decay=0.0,
        ),
        run=Run(
            model=str(tiny_world.POLICY), steps=66, prompts_per_step=32, group_size=8, save_every=22
        ),
    )
    if variant.startswith("warm_start"):
        parts = ["demonstrations", "memories", "practice"]
        config.update.lr_schedule = "cosine"
        config.update.warmup_steps = 50
        config.update.b2 = 0.99
        config.update.pack_windows = 5  # examples show a photo each, not one for a group
        config.run = Run(
            model=f"{WORLD}/policy", steps=2000, prompts_per_step=64, save_every=250, log_to=""
        )
        config.update.learning_rate = 1.5e-3
        if variant == "warm_start_facts":  # reading is learned by now, the many facts are not
            parts.remove("practice")
            config.run.model = "build/tiny_warm_start/policy"
            config.run.steps, config.run.seed = 1000, 1
            config.update.learning_rate = 1e-3
        config.data.train = tuple(f"{WORLD}/{part}.jsonl" for part in parts)
    return config
