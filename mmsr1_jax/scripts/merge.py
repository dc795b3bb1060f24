"""Merges an adapter into the policy that it was trained for.

    python -m mmsr1_jax.scripts.merge --model=BASE --adapter=RUN/adapter --out=DIR

BASE is the HF directory that the run began with; RUN/adapter what `train` or `sft` left there with
`--config.update.lora_rank`, or plain LoRA of the PEFT library. DIR becomes an HF directory.
"""

import pathlib
import sys

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.rl import lora


def main(argv) -> None:
    del argv
    try:
        merge(_MODEL.value, _ADAPTER.value, _OUT.value)
    except (ValueError, OSError) as error:  # policy, adapter or place: said in one line
        sys.exit(f"error: {error}")
    print(f"{_OUT.value}: {_MODEL.value} with {_ADAPTER.value}")


def merge(model_dir: str, adapter_dir: str, out: str) -> None:
    """Writes the policy of `model_dir` with the adapter to `out`.

    Raises:
      ValueError, OSError: something cannot be used; the message names it. Nothing is written then.
    """
    if pathlib.Path(out).resolve() == pathlib.Path(model_dir).resolve():
        raise ValueError(f"--out={out}: is --model, which is not to be written over")
    config = qwen2_5_vl.ModelConfig.from_directory(model_dir)
    adapters, scale = lora.load(adapter_dir, config)  # first: the policy takes longer
    model = qwen2_5_vl.load(model_dir, mesh=sharding.make_mesh())
    lora.merge_into(model, adapters, scale)
    qwen2_5_vl.save(model, out, source=model_dir)


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _ADAPTER = flags.DEFINE_string("adapter", None, "directory of the adapter", required=True)
    _OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
    cli.run(main)
