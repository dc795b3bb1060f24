"""Qwen3-VL-8B on one node of eight accelerators with 80 GB each.

--config=configs/qwen3vl_8b.py       settings of SenseNova-MARS (arXiv 2512.24330) where published
--config=configs/qwen3vl_8b.py:sft   for `sft`: supervised fine-tuning on traces

SenseNova-MARS also crops images and normalises advantages over the batch; neither is done here.

Memory budget of a GPU's 74 GiB, computed, not measured: parameters and moments in float32 12 GiB;
during rollouts a KV cache of 27 GiB and the engine's policy of 16 GiB; instead of both, an update
needs 8 GiB for two sums of gradients, plus the saved activations of a row, 9 GiB. JAX takes three
quarters of a GPU's memory by default, so set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
"""

from mmsr1_jax.config import (
    Buckets,
    Config,
    ConfigError,
    Images,
    Mesh,
    Model,
    Objective,
    Rollout,
    Run,
    Tools,
    Turns,
    Update,
)


def get_config(variant: str = "paper") -> Config:
    if variant not in ("paper", "sft"):
        raise ConfigError(f"configs/qwen3vl_8b.py:{variant}: use :paper or :sft")
    config = Config(
        model=Model(
            dtype="bfloat16",  # as released
            attention="auto",
            remat="full",  # activations of 36 layers for a row would not fit otherwise
            logprob_chunk=256,  # 256 x 151,936 float32 logits a row: 156 MB
        ),
        mesh=Mesh(replica=1, fsdp=-1, tensor=1),
        buckets=Buckets(
            lengths=(1024, 2048, 4096, 8192, 16384, 32768),
            # Groups of 64 patches. An image within the limits below takes 4 to 507 of them.
            image_windows=(16, 64, 256, 512, 1024),
            batch_tokens=65536,
            batch_windows=1024,
        ),
        images=Images(
            min_pixels=65_536,  # the paper: 64 to 8,100 visual tokens an image
            max_pixels=8_294_400,
        ),
        rollout=Rollout(
            lanes=64,
            cache_tokens=24 * 8192,  # of 144 KiB each: 27 GiB
            decode_batch_size=32,  # a step reads 15 GB of weights, and 1.2 GB for each full row
            decode_steps=16,
            prefill_buckets=(64, 256, 1024),
            prefill_tokens=1024,
            encode_windows=64,
            image_cache_tokens=32768,  # of 32 KiB with DeepStack's features: 1 GiB
            precompile=True,
        ),
        turns=Turns(
            max_turns=10,  # the paper
            max_searches=9,
            max_text_searches=9,
            max_new_tokens=2048,  # not published
            max_episode_tokens=32768,  # the paper: 16k of prompt and 16k of response
            min_turn_tokens=512,
            max_result_tokens=8192,  # the paper: text of tools is cut there
        ),
        tools=Tools(
            max_results=5,
            max_pixels=336 * 336,  # 100 tokens a thumbnail
        ),
        objective=Objective(
            ratio_level="sequence",  # the paper: GSPO
            kl_coef=0.0,  # the paper
            clip_low=0.2,  # the paper
            clip_high=0.28,
            num_minibatches=1,
        ),
        update=Update(
            pack_length=32768,
            pack_windows=1024,
            micro_batch_rows=1,
            freeze_vision=True,  # the paper
            learning_rate=1e-5,  # the paper
            lr_schedule="constant",
            max_grad_norm=1.0,
        ),
        run=Run(
            model="build/qwen3-vl-8b",  # downloaded by third_party/fetch.py
            steps=100,  # not published
            prompts_per_step=128,  # the paper
            group_size=8,
            save_every=10,
            validate_every=10,
        ),
    )
    if variant == "sft":
        config.update.lr_schedule = "cosine"
        config.update.warmup_steps = 6
        config.run.steps = 62  # one epoch of 8,000 traces
    return config
