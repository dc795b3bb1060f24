"""Writes the embedded task: a small made-up world, as files that the other commands read.

python -m mmsr1_jax.tiny_world --out=DIR [--seed=0] [--train=2400 --heldout=240 --unmet=120]

DIR/policy/         a random policy of a few million parameters, with a tokenizer of its own
DIR/index/          pages and pictures to be searched
DIR/stories.jsonl   what a warm start is taught: its searches are drawn without regard to need
DIR/*.parquet       questions: train, heldout (new photos, facts that were never asked), unmet
                    (landmarks that were never met)
"""

import json
import pathlib

from absl import flags

from mmsr1_jax import config as settings
from mmsr1_jax import tiny
from mmsr1_jax.data import tiny_world, write_parquet
from mmsr1_jax.images import ImageProcessor
from mmsr1_jax.models import qwen2_5_vl

_OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the world and of the random policy")
_COUNTS = {
    name: flags.DEFINE_integer(name, count, f"questions of {name}.parquet")
    for name, count in (("train", 2400), ("heldout", 240), ("unmet", 120))
}
_STORIES = flags.DEFINE_integer("stories", 12000, "lines of stories.jsonl, a half of them memories")

# A photo of 84 x 84 pixels is 9 tokens, a thumbnail of 56 x 56 4.
IMAGES = ImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84)

CONFIG = qwen2_5_vl.ModelConfig(
    text=qwen2_5_vl.TextConfig(
        vocab_size=1152,  # a little more than the tokenizer has, as in the released models
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        mrope_section=(4, 6, 6),
    ),
    vision=qwen2_5_vl.VisionConfig(
        num_layers=4,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=192,
        full_attention_layers=(1, 3),
        window_size=112,
    ),
    image_token_id=5,
    video_token_id=1151,
    vision_start_token_id=3,
    vision_end_token_id=4,
)


def main(argv) -> None:
    del argv
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    world = tiny_world.World.make(_SEED.value)
    tiny.write(
        out / "policy", config=CONFIG, images=IMAGES, seed=_SEED.value,
        tokenizer=tiny_world.train_tokenizer(),
    )  # fmt: skip
    tiny_world.write_index(world, out / "index")
    for split, count in _COUNTS.items():
        write_parquet(out / f"{split}.parquet", tiny_world.questions(world, split, count.value))
    count = write_stories(world, out, _STORIES.value)
    print(f"wrote {count} stories, questions, an index and a random policy to {out}")


def write_stories(world: tiny_world.World, out: pathlib.Path, count: int) -> int:
    """`out/stories.jsonl`, with the pictures beside it in `stories/`; returns the lines."""
    (out / "stories").mkdir(exist_ok=True)
    stories = [
        *tiny_world.demonstrations(world, count // 2),
        *tiny_world.memories(world, count // 2),
    ]
    with open(out / "stories.jsonl", "w", encoding="utf-8") as file:
        for number, story in enumerate(stories):
            image = story.pop("image")
            story["images"] = []
            if image is not None:
                story["images"] = [f"stories/{number:06d}.jpg"]
                (out / story["images"][0]).write_bytes(image)
            file.write(json.dumps({"id": str(number), **story}) + "\n")
    return len(stories)


if __name__ == "__main__":
    settings.run(main)
