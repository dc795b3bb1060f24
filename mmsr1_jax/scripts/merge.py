"""Merge a LoRA adapter into the policy that it was trained for.

    python -m mmsr1_jax.scripts.merge --model=BASE --adapter=RUN/adapter --out=DIR

BASE is the HF directory of the run's initial policy. RUN/adapter is the adapter that `train` or
`sft` writes with `--config.update.lora_rank`, or a plain LoRA adapter of the PEFT library. The
merged policy is written to DIR as an HF directory.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.families import read_config
from mmsr1_jax.rl import lora


def main(argv: Sequence[str]) -> None:
    del argv
    merge(_MODEL.value, _ADAPTER.value, _OUT.value)
    print(f"merged {_MODEL.value} and {_ADAPTER.value}: {_OUT.value}")


def merge(model_dir: str, adapter_dir: str, out: str) -> None:
    """Write the policy of `model_dir`, merged with the adapter, to `out`.

    Raises:
      UserError, OSError: An argument is invalid; the message names it. Nothing is written.
    """
    if pathlib.Path(out).resolve() == pathlib.Path(model_dir).resolve():
        raise UserError(f"--out={out}: is the same directory as --model; name another one")
    config = read_config(model_dir)
    adapters, scale = lora.load(adapter_dir, config)  # first, as the policy takes longer
    model = checkpoint.load(model_dir, mesh=sharding.make_mesh())
    lora.merge_into(model, adapters, scale)
    checkpoint.save(model, out, source=model_dir)


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _ADAPTER = flags.DEFINE_string("adapter", None, "directory of the adapter", required=True)
    _OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
    cli.run(main)
