"""SFT dataset: JSONL files with two kinds of lines.

    saved episode     from `RUN/episodes/*.jsonl`: its tokens and images are used unchanged
    row               {"question": text, "turns": [text, ..]}, optionally with "image": path or
                      "images": [path, ..] (relative to the file) and "id". "turns" are the
                      policy's turns without end tokens. Their searches are executed by the tools,
                      or in a local index with "index": path

Images and indexes must lie in the folder of the file that names them (for a run's `episodes/`, also
in `images/` next to it), or in one of `config.data.image_roots`.

At the start of a run the files are read, the turns replayed with their searches, and the episodes
checked. The result is stored in the run's directory:

    files ──prepare──► RUN/examples.jsonl, RUN/images/ ──load──► examples ──step_indices──► a step
"""

import asyncio
import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from mmsr1_jax.config import settings
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.scripted import ScriptedEpisode, replay
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.images import ImageProcessor, read_image, write_image
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.rl.packing import RowShape
from mmsr1_jax.rollout.image_cache import check_image
from mmsr1_jax.tools import Observation, Query, Tool
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.tools.service_checks import check_services
from mmsr1_jax.training import sft_lines
from mmsr1_jax.training.sft_lines import LineError
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.files import resolve_inside
from mmsr1_jax.utils.logs import log

PREPARE_SECONDS = 86400.0  # for which processes wait until one has prepared the examples
_BATCH_SIZE = 64  # number of lines whose images are in memory at a time


class _Header(TypedDict):
    made_with: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SFTExample:
    """Training example: an episode whose images are read on demand.

    Attributes:
      tokens: int32[T], tokens of the episode.
      mask: bool[T], True for tokens that the policy wrote; only they carry loss.
      images: Image files, in the order of their placeholders.
    """

    tokens: np.ndarray
    mask: np.ndarray
    images: tuple[pathlib.Path, ...]

    def prompt(self, processor: ImageProcessor) -> Prompt:
        """Return the whole episode as model input.

        Raises:
          ImageError: An image cannot be read, see `read_image`.
        """
        return Prompt(self.tokens, tuple(read_image(path, processor) for path in self.images))


def to_line(
    episode: Episode, processor: Processor, folder: pathlib.Path, image_folder: pathlib.Path
) -> dict[str, Any]:
    """Write an episode's images, and return the episode as a line of a JSONL file.

    Args:
      episode: Episode to write.
      processor: Processor of the policy.
      folder: Folder of the JSONL file; paths in "images" are relative to it.
      image_folder: Folder of the images, created if it does not exist.
    """
    image_folder.mkdir(parents=True, exist_ok=True)
    paths = [write_image(image, processor.images, image_folder) for image in episode.images]
    return episode.to_json(processor, [os.path.relpath(path, folder) for path in paths])


def step_indices(step: int, count: int, size: int, seed: int) -> list[int]:
    """Return the indices of a step's examples, from data that is reshuffled every epoch.

    Args:
      step: Step, counted from 1.
      count: Number of examples in the dataset.
      size: Number of examples per step.
      seed: Seed of the order, not negative.
    """

    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    first, last = (step - 1) * size, step * size
    epochs = range(first // count, (last - 1) // count + 1)
    order = np.concatenate([permutation(epoch) for epoch in epochs])
    start = first - epochs[0] * count
    return order[start : start + size].tolist()


def prepare(
    path: pathlib.Path,
    config: settings.Config,
    processor: Processor,
    model_config: ModelConfig,
) -> None:
    """Write the episodes of `config.data.train` to `path`, their images to `images/` beside it.

    `path` appears once it is complete. Lines that cannot be used are skipped and logged.

    Raises:
      DataError: The files do not exist, no line can be used, or too many lines cannot be used.
      ToolsError, ..: The tools cannot be created, see `tools.build.make_tools`.
    """
    files = _find_files(config.data.train)
    num_skipped = num_written = num_scripted = 0
    shape = RowShape(1, config.update.pack_length, config.update.pack_windows)
    bar = tqdm(total=sum(1 for file in files for _ in checked_json.jsonl_lines(file)), unit="line")
    with outputs.new_text_file(path) as out:
        with bar:
            out.write(json.dumps({"made_with": _made_with(config)}) + "\n")
            for location, content, episode in _episodes(files, config, processor, model_config):
                bar.update()
                try:
                    if isinstance(episode, LineError):
                        raise episode
                    if isinstance(content, ScriptedEpisode):
                        sft_lines.check_replay(episode, content)
                    sft_lines.check_episode(episode, model_config, shape)
                except LineError as error:
                    num_skipped += 1
                    log.warning("%s: %s; skipped", location, error)
                    if num_skipped > config.data.max_bad_rows:
                        raise DataError(
                            f"skipped {num_skipped} lines, more than config.data.max_bad_rows="
                            f"{config.data.max_bad_rows}; the last one is {location}: {error}"
                        ) from None
                    continue
                episode.group = episode.index = num_written
                line = to_line(episode, processor, path.parent, path.parent / "images")
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_written += 1
                num_scripted += isinstance(content, ScriptedEpisode)
        if not num_written:
            raise DataError(f"{', '.join(map(str, files))}: no line can be used for training")
    log.info(
        "%s: %d training episodes, %d of them replayed from scripted turns; skipped %d lines",
        path, num_written, num_scripted, num_skipped,
    )  # fmt: skip


def load(path: pathlib.Path, config: settings.Config) -> list[SFTExample]:
    """Load the examples that `prepare` wrote.

    Raises:
      DataError: The file was not written by `prepare`, or with other settings.
    """
    examples = []
    with open(path, encoding="utf-8") as file:
        try:
            made_with = checked_json.loads(next(file), _Header)["made_with"]
            expected = _made_with(config)
            changed = [name for name in expected if made_with.get(name) != expected[name]]
            if changed:
                name = changed[0]
                raise DataError(
                    f"{path}: was made with config.{name}={made_with.get(name)}, but this command "
                    f"sets {expected[name]}. Resume with the same data and settings, or use "
                    "another --workdir"
                )
            for line in file:
                data = checked_json.loads(line, dict[str, Any], surrogates=True, nan=True)
                episode = Episode.from_json(data)
                images = tuple(
                    resolve_inside(name, path.parent)
                    for name in sft_lines.string_list(data, "images")
                )
                examples.append(SFTExample(episode.tokens, episode.loss_mask, images))
        except DataError:
            raise
        except (StopIteration, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error!r})") from None
    return examples


def make_rules(config: settings.Config, processor: Processor, model_config: ModelConfig) -> Rules:
    """Return the rules by which an engine with these settings writes prompts and replies."""
    return Rules(
        processor,
        config.turns,
        config.tools,
        prompts.load(config.turns.prompt_dir),
        max_file_pixels=config.images.max_file_pixels,
        check_image=lambda image: check_image(
            image, model_config, config.rollout, config.buckets.image_windows
        ),
    )


def _episodes(
    files: Sequence[pathlib.Path],
    config: settings.Config,
    processor: Processor,
    model_config: ModelConfig,
) -> Iterator[tuple[str, Episode | ScriptedEpisode | LineError, Episode | LineError]]:
    """Yield the location, content and unchecked episode of each line, in order."""
    lines = ((file, *line) for file in files for line in checked_json.jsonl_lines(file))
    rules, roots = make_rules(config, processor, model_config), config.data.image_roots
    get_tools = functools.cache(lambda index: _tools(config, index))  # saved episodes need no tools
    while batch := list(itertools.islice(lines, _BATCH_SIZE)):
        contents = [
            sft_lines.read_line(file, line_number, text, processor.images, roots)
            for file, line_number, text in batch
        ]
        replayed: dict[pathlib.Path | None, Iterator[Episode]] = {}
        for index in {item.index for item in contents if isinstance(item, ScriptedEpisode)}:
            rows = [
                item
                for item in contents
                if isinstance(item, ScriptedEpisode) and item.index == index
            ]
            replayed[index] = iter(list(replay(rows, processor, rules, get_tools(index))))
        for (file, line_number, _), item in zip(batch, contents, strict=True):
            episode = next(replayed[item.index]) if isinstance(item, ScriptedEpisode) else item
            yield f"{file}, line {line_number}", item, episode


def _made_with(config: settings.Config) -> dict[str, Any]:
    """Return the settings that the prepared episodes depend on, as JSON-serialisable data."""
    values: dict[str, Any] = {"data.train": config.data.train}
    for section in ("turns", "tools", "images"):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            values[f"{section}.{name}"] = value
    for name in ("pack_length", "pack_windows"):
        values[f"update.{name}"] = getattr(config.update, name)
    return json.loads(json.dumps(values))


def _tools(config: settings.Config, index: pathlib.Path | None) -> dict[str, Tool]:
    """Return the configured tools, or those of a local index, each with a timeout.

    A tool that is not configured raises LookupError when called, so that its searches fail.

    Raises:
      ServiceRefusedError: A service refuses requests.
    """
    if index is not None:
        local = dataclasses.replace(config.tools, text="local", image="local", index=str(index))
        config = dataclasses.replace(config, tools=local)
    else:
        check_services(config, [config.turns], judge=False)
    tools, timeout = make_tools(config), config.tools.timeout

    def limited(action: str, tool: Tool | None) -> Tool:
        async def search(query: Query) -> Observation:
            if tool is None:
                raise LookupError(f"no tool for {action} (config.tools)")
            async with asyncio.timeout(timeout):
                return await tool(query)

        return search

    return {
        action: limited(action, tools.get(action)) for action in ("text_search", "image_search")
    }


def _find_files(patterns: Sequence[str]) -> list[pathlib.Path]:
    """Return the distinct JSONL files of paths, directories and patterns, each sorted by name."""
    files: dict[pathlib.Path, None] = {}
    for pattern in patterns:
        path = pathlib.Path(pattern)
        matches = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not path.exists():
            matches = sorted(map(pathlib.Path, glob.glob(pattern)))
        if not matches:
            raise DataError(f"config.data.train: {pattern} matches no JSONL file")
        files |= dict.fromkeys(matches)
    if not files:
        raise DataError("config.data.train names no JSONL file")
    return list(files)
