"""A small SFT dataset: its files, a policy and an index, and settings to train on it."""

import dataclasses
import json
import pathlib
import runpy
from typing import Any

import numpy as np
import PIL.Image

from mmsr1_jax.config import settings
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import sft_dataset
from mmsr1_jax.training.sft_dataset import SFTExample
from tests.programs import ROOT

NUM_ROWS = 8
MODEL = dataclasses.replace(
    random_policy.CONFIG,
    text=dataclasses.replace(random_policy.CONFIG.text, num_layers=2),
    vision=dataclasses.replace(
        random_policy.CONFIG.vision, num_layers=2, full_attention_layers=(1,)
    ),
)


def noise(seed: int, width: int = 112, height: int = 112) -> PIL.Image.Image:
    """Return an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def write_lines(path: pathlib.Path, lines: list) -> pathlib.Path:
    """Write a JSONL file, and return its path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write(folder: pathlib.Path) -> None:
    """Write `policy/`, `index/`, images, and scripted rows to `rows.jsonl`.

    By its number modulo 3, a row answers at once, after an image search, or after a text search.
    The search of row i finds the title "bridge i" or the text "Opened in 1900 + i.".
    """
    random_policy.write(folder / "policy", config=MODEL, seed=2)
    for i in range(NUM_ROWS):
        noise(i).save(folder / f"{i}.png")
    pages = [
        {"url": f"http://p/{i}", "title": f"tower {i}", "summary": f"Opened in {1900 + i}."}
        for i in range(NUM_ROWS)
    ]
    images = [{"image": f"{i}.png", "title": f"bridge {i}"} for i in range(NUM_ROWS)]
    build_index(
        folder / "index",
        [write_lines(folder / "pages.jsonl", pages)],
        [write_lines(folder / "images.jsonl", images)],
    )
    rows = []
    for i in range(NUM_ROWS):
        reason = f"<reason> It is {i}.</reason>"
        searches = [[], ["<search><img></search>"], [f"<text_search> tower {i}</text_search>"]]
        actions = [*searches[i % 3], f"<answer> {1900 + i}</answer>"]
        image = [{"image": f"{i}.png"}, {"images": [f"{i}.png"]}, {}][i % 3]
        turns = [f"{reason} {action}" for action in actions]
        rows.append({"question": f"Which year is {i}?", "turns": turns, **image})
    write_lines(folder / "rows.jsonl", rows)


def read_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows that `write` wrote."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def make_config(folder: pathlib.Path, **changes) -> settings.Config:
    """Return settings for the files in `folder`; a change is named `section_field`."""
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
    config.tools.index, config.tools.max_results = str(folder / "index"), 1
    config.turns.max_episode_tokens = 2048
    config.data.train = (str(folder / "rows.jsonl"),)
    config.update.pack_length, config.update.pack_windows = 384, 12
    for name, value in changes.items():
        section, _, field = name.partition("_")
        setattr(getattr(config, section), field, value)
    return config


def make_flags(folder: pathlib.Path, **changes) -> list[str]:
    """Return the flags of a training run on the files in `folder`; changes are `section.field`."""
    fields = {
        "tools.index": folder / "index",
        "tools.max_results": 1,
        "turns.max_episode_tokens": 2048,
        "data.train": f"('{folder / 'rows.jsonl'}',)",
        "update.pack_length": 384,
        "update.pack_windows": 12,
        "update.learning_rate": 3e-3,
        "run.prompts_per_step": 6,
        "run.steps": 56,
        "run.save_every": 6,
    } | changes
    return ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in fields.items())]


def prepare_examples(
    folder: pathlib.Path, path: pathlib.Path
) -> tuple[list[SFTExample], Processor]:
    """Prepare the dataset of `folder` in the file `path`; return its examples and the processor."""
    processor = Processor.from_directory(folder / "policy")
    sft_dataset.prepare(path, make_config(folder), processor, MODEL)
    return sft_dataset.load(path, make_config(folder)), processor
