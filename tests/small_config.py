"""Settings for the small random policies of the tests; their pictures are larger than tiny's."""

from mmsr1_jax.config import Buckets, Config, Mesh, Model, Rollout, Tools, Turns
from mmsr1_jax.config_training import Run, Update


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
            rows=16,
            chunk=16,
            extend_lengths=(32, 64, 128, 256),
            extend_tokens=32,  # one lane at a time: rows of padding would cost as much as real ones
            encode_windows=16,
            image_tokens=8192,
        ),
        turns=Turns(
            turn_tokens=128,
            tokens=2048,  # the small tokenizer needs about three times as many as the released one
            least_tokens=64,
            result_tokens=768,
        ),
        tools=Tools(
            result_chars=600,
            max_pixels=112 * 112,  # 16 tokens
        ),
        update=Update(row_tokens=2048, row_windows=64, learning_rate=1e-3),
        run=Run(questions=8, rollouts=8),
    )
