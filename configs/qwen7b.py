"""Qwen2.5-VL-7B on one node of eight accelerators with 80 GB each.

--config=configs/qwen7b.py           settings of the paper (arXiv 2506.20670)
--config=configs/qwen7b.py:script    settings of the single-node script that its authors published
--config=configs/qwen7b.py:sft       for `sft`: the paper's supervised baseline, on 8k traces

Memory budget of a GPU's 74 GiB, computed, not measured: parameters and moments in float32 12 GiB;
during rollouts a KV cache of 21 GiB and the engine's policy of 15 GiB; instead of both, an update
needs 8 GiB for two sums of gradients, plus the saved activations of a row. JAX takes three quarters
of a GPU's memory by default, so set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
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
    if variant not in ("paper", "script", "sft"):
        raise ConfigError(f"configs/qwen7b.py:{variant}: use :paper, :script or :sft")
    script = variant == "script"
    config = Config(
        model=Model(
            dtype="bfloat16",  # as released
            attention="auto",
            remat="full",  # activations of 28 layers for an 8k row would not fit otherwise
            logprob_chunk=256,  # 256 x 152,064 float32 logits a row: 156 MB
        ),
        mesh=Mesh(replica=1, fsdp=-1, tensor=1),
        buckets=Buckets(
            # The published script: prompts up to 4,096 tokens, all turns up to 8,192.
            lengths=(1024, 2048, 4096, 6144, 8192),
            # An image within the limits below takes 21 to 96 windows, mostly under 70.
            image_windows=(24, 48, 96, 192, 384),
            batch_tokens=65536,  # one 8k row per device
            batch_windows=768,
        ),
        images=Images(
            min_pixels=512 * 512,  # the published script: 334 to 1,152 visual tokens an image
            max_pixels=2 * 672 * 672,
        ),
        rollout=Rollout(
            lanes=128,  # more than are decoded, as some wait for tools
            cache_tokens=48 * 8192,  # of 56 KiB each: 21 GiB; an episode takes 2k to 3k on average
            decode_batch_size=64,  # a step reads 14 GB of weights, and 0.1 GB for each row
            decode_steps=16,
            prefill_buckets=(64, 256, 1024),
            prefill_tokens=1024,
            encode_windows=96,  # one large image, or many thumbnails
            image_cache_tokens=65536,  # 450 MiB
            precompile=True,
        ),
        turns=Turns(
            max_new_tokens=2048,  # the published script: 2,048 a turn, 8,192 in all
            max_episode_tokens=8192,
            min_turn_tokens=512,
            max_result_tokens=2048,
        ),
        tools=Tools(
            max_results=5,  # the paper
            max_pixels=336 * 336,  # 144 tokens a thumbnail, five of them 720
        ),
        objective=Objective(
            kl_coef=1e-3,  # paper and script, with k3
            clip_low=0.2,
            clip_high=0.2,
            reference="host",  # 15 GB of bfloat16, needed only once per step
            num_minibatches=1 if script else 4,  # the paper: 128 of 512 questions each
        ),
        update=Update(
            pack_length=8192,
            pack_windows=256,  # a question's image and five thumbnails take up to 153
            micro_batch_rows=1,
            learning_rate=2e-6,
            # The script: decays to 5 % around step 45.
            lr_schedule="sigmoid" if script else "constant",
            max_grad_norm=1.0,
        ),
        run=Run(
            model="build/qwen2.5-vl-7b",  # downloaded by third_party/fetch.py
            steps=50,  # the paper uses the checkpoint of step 50
            prompts_per_step=32 if script else 512,
            group_size=4 if script else 8,
            save_every=10,
            validate_every=10,
        ),
    )
    if variant == "sft":
        config.update.learning_rate = 1e-5  # the paper: 1e-5, cosine, 10 % warm-up, one epoch
        config.update.lr_schedule = "cosine"
        config.update.warmup_steps = 6
        config.run.prompts_per_step = 128  # not published
        config.run.steps = 62  # one epoch of 8,000 traces
    return config
