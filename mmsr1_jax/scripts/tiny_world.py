"""Write the built-in toy task, a small synthetic world, as files that the other commands read.

python -m mmsr1_jax.scripts.tiny_world [--out=DIR] [--seed=0] \\
    [--train=2400 --heldout=240 --unmet=120 ..]

DIR/policy/         random policy of a million parameters, with its own tokenizer
DIR/index/          pages and images to search
DIR/*.jsonl         warm-start data: demonstrations, whose searches are drawn regardless of need;
                    memories; and reading practice about other worlds
DIR/*.parquet       questions: train, heldout (new photos, facts not asked about in training), unmet
                    (landmarks not seen in training)
"""

import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.data import tiny_world, write_parquet
from mmsr1_jax.data.tiny_world.questions import Split
from mmsr1_jax.models.families import FAMILIES
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.utils import outputs

_NUM_PRACTICE_WORLDS = 12  # small worlds for reading practice
_DEFAULT_COUNTS: dict[Split, int] = {"train": 2400, "heldout": 240, "unmet": 120}  # of questions

# A photo of 84 x 84 pixels has 9 tokens, a thumbnail of 56 x 56 pixels has 4.
IMAGES = ImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84)

CONFIG = next(iter(FAMILIES.values())).small["tiny_world"]


def main(argv: Sequence[str]) -> None:
    del argv
    out = pathlib.Path(_OUT.value)
    with outputs.lock(out):
        write(out)
    print(f"wrote an index, questions and a random policy to {out}")


def write(out: pathlib.Path) -> None:
    """Write the task specified by the flags."""
    world = tiny_world.World.generate(_SEED.value)
    random_policy.write(
        out / "policy", config=CONFIG, images=IMAGES, seed=_SEED.value,
        tokenizer=tiny_world.train_tokenizer(), param_dtype=jnp.bfloat16,
    )  # fmt: skip
    tiny_world.write_index(world, out / "index")
    for split in typing.get_args(Split):
        questions = tiny_world.questions(world, split, _COUNTS[split].value)
        write_parquet(out / f"{split}.parquet", questions)
    if _SFT_EXAMPLES.value:
        write_sft_examples(world, out, _SFT_EXAMPLES.value)


def write_sft_examples(world: tiny_world.World, out: pathlib.Path, count: int) -> None:
    """Write the warm-start data, `count` lines in each of three files.

    Their images are written to `out/sft/`, and the indexes of other worlds to `out/practice/`.
    """
    practice = []
    for index in range(min(_NUM_PRACTICE_WORLDS, count)):
        other = tiny_world.World.generate(
            world.seed + 1 + index, landmarks=100, remembered=1, unmet=1, strangers=1
        )
        folder = f"practice/{index:02d}"
        tiny_world.write_index(other, out / folder)
        num_lines = count // _NUM_PRACTICE_WORLDS + (index < count % _NUM_PRACTICE_WORLDS)
        practice += [
            example | {"index": folder} for example in tiny_world.practice(other, world, num_lines)
        ]
    _write_jsonl(tiny_world.demonstrations(world, count), out, "demonstrations")
    _write_jsonl(tiny_world.memories(world, count), out, "memories")
    _write_jsonl(practice, out, "practice")


def _write_jsonl(examples: Sequence[Mapping[str, Any]], out: pathlib.Path, name: str) -> None:
    """Write `out/NAME.jsonl`, and the images of its lines to `out/sft/NAME/`."""
    folder = pathlib.Path("sft", name)
    (out / folder).mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.jsonl"
    path.unlink(missing_ok=True)  # first, so that no old line refers to a new image
    with outputs.new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for index, example in enumerate(examples):
            images = []
            if example["image"] is not None:
                images = [str(folder / f"{index:06d}.jpg")]
                (out / images[0]).write_bytes(example["image"])
            line = {"id": f"{name}-{index}", **example, "images": images}
            del line["image"]
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", "build/tiny_world", "directory to write")
    _SEED = flags.DEFINE_integer("seed", 0, "seed of the world and of the random policy")
    _COUNTS = {
        split: flags.DEFINE_integer(split, count, f"number of questions in {split}.parquet")
        for split, count in _DEFAULT_COUNTS.items()
    }
    _SFT_EXAMPLES = flags.DEFINE_integer(
        "sft_examples",
        6000,
        "number of lines in each of demonstrations.jsonl, memories.jsonl and practice.jsonl",
    )
    cli.run(main)
