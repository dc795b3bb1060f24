"""The embedded default: a policy of a few hundred thousand parameters on a laptop's CPU."""

from mmsr1_jax.config import Buckets, Config, Mesh, Model


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
    )
