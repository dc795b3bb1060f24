"""Settings for the small random policies of the tests, which see larger images than `tiny`."""

from mmsr1_jax.config.settings import Buckets, Config, Mesh, Model, Rollout, Tools, Turns
from mmsr1_jax.config.training import Run, Update


def get_config() -> Config:
    return Config(
        model=Model(
            dtype="float32",  # bfloat16 is slower than float32 on a CPU
            attention="xla",  # rows are short
        ),
        mesh=Mesh(replica=1, fsdp=-1, tensor=1),
        buckets=Buckets(
            lengths=(128, 256, 512, 1024),
            image_windows=(4, 8, 16, 32, 64),  # the tiny policy's images have up to 256 tokens
            batch_tokens=2048,
            batch_windows=64,
        ),
        rollout=Rollout(
            lanes=16,
            decode_batch_size=16,
            decode_steps=16,
            prefill_buckets=(32, 64, 128, 256),
            prefill_tokens=32,  # one lane at a time, as padded rows cost as much as real ones
            encode_windows=16,
            image_cache_tokens=8192,
        ),
        turns=Turns(
            max_new_tokens=128,
            max_episode_tokens=2048,  # the small tokenizer needs three times as many as Qwen's
            min_turn_tokens=64,
            max_result_tokens=768,
        ),
        tools=Tools(
            max_result_chars=600,
            max_pixels=112 * 112,  # 16 tokens
        ),
        update=Update(pack_length=2048, pack_windows=64, learning_rate=1e-3),
        run=Run(prompts_per_step=8, group_size=8),
    )
