"""Build a local index of pages and images, for `--config.tools.index=DIR`.

    python -m mmsr1_jax.scripts.index --pages=PAGES.jsonl --images=IMAGES.jsonl --out=DIR \\
        [--model=DIR]

Line of PAGES: {"url": .., "title": .., "snippet": .., "text": .. or "summary": ..}
Line of IMAGES: {"image": PATH, "title": .. or "titles": [..], "link": ..}

PATH is relative to the folder of IMAGES. It must lie in that folder or in one of
`--image_roots=DIR,..`, because the index exposes the images to its users. The flags `--pages` and
`--images` may be repeated.

With `--model`, an HF directory, the images are also embedded by its vision tower, for searches with
`--config.tools.image_model=DIR`. That DIR may be another directory with the same vision tower.
"""

import sys

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.tools.index_builder import build_index


def main(argv) -> None:
    del argv
    try:
        embed = None
        if _MODEL.value is not None:
            from mmsr1_jax.tools.embedding import Embedder  # only if needed, as it takes a second

            embed = Embedder(_MODEL.value)
        pages, pictures = build_index(
            _OUT.value, _PAGES.value, _IMAGES.value, embed=embed, image_roots=_ROOTS.value
        )
    except (ValueError, OSError) as error:  # invalid model, pages or images: a one-line error
        sys.exit(f"error: {error}")
    print(f"{pages} pages and {pictures} titles of pictures in {_OUT.value}")


if __name__ == "__main__":
    _PAGES = flags.DEFINE_multi_string("pages", [], "JSONL of pages")
    _IMAGES = flags.DEFINE_multi_string("images", [], "JSONL of pictures")
    _MODEL = flags.DEFINE_string(
        "model", None, "HF directory whose vision tower embeds the pictures"
    )
    _ROOTS = flags.DEFINE_list("image_roots", [], "other directories in which pictures may lie")
    _OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
    cli.run(main)
