"""SFT dataset: JSONL files with two kinds of lines.

    saved episode     from `RUN/episodes/*.jsonl`: its tokens and images are used unchanged
    row               {"question": text, "turns": [text, ..]}, optionally with "image": path or
                      "images": [path, ..] (relative to the file) and "id". "turns" are the
                      policy's turns without end tokens. Their searches are executed by the tools,
                      or in a local index with "index": path

Images and indexes must lie in the folder of the file that names them (for a run's `episodes/`, also
in `pictures/` next to it), or in one of `config.data.image_roots`.

At the start of a run the files are read, the turns replayed with their searches, and the episodes
checked. The result is stored in the run's directory:

    files ──prepare──► RUN/stories.jsonl, RUN/pictures/ ──load──► lessons ──chosen──► a step
"""

import asyncio
import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.scripted import ScriptedEpisode, replay
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.processing.images import ImageError, ImageProcessor, read_image, write_image
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.rl.packing import RowShape, check_fits
from mmsr1_jax.rollout.device import check_image
from mmsr1_jax.tools import Observation, Query, Tool, local
from mmsr1_jax.tools.build import check_services, make_tools
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.files import FileRefusedError, check_regular, resolve_inside

_AT_ONCE = 64  # number of lines whose images are in memory at a time


class _Header(TypedDict):
    made_with: dict[str, Any]


class LineError(UserError):
    """Line that cannot be used for training; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class SFTExample:
    """Training example: an episode whose images are read on demand.

    Attributes:
      tokens: int32[T], tokens of the episode.
      mask: bool[T], True for tokens that the policy wrote; only they carry loss.
      pictures: Image files, in the order of their placeholders.
    """

    tokens: np.ndarray
    mask: np.ndarray
    pictures: tuple[pathlib.Path, ...]

    def prompt(self, processor: ImageProcessor) -> Prompt:
        """Return the whole episode as model input.

        Raises:
          ImageError: An image cannot be read, see `read_image`.
        """
        return Prompt(self.tokens, tuple(read_image(path, processor) for path in self.pictures))


def line_of(
    episode: Episode, processor: Processor, folder: pathlib.Path, pictures: pathlib.Path
) -> dict[str, Any]:
    """Write an episode's images, and return the episode as a line of a JSONL file.

    Args:
      episode: Episode to write.
      processor: Processor of the policy.
      folder: Folder of the JSONL file; paths in "images" are relative to it.
      pictures: Folder of the images, created if it does not exist.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    paths = [write_image(image, processor.images, pictures) for image in episode.images]
    return episode.to_json(processor, [os.path.relpath(path, folder) for path in paths])


def chosen(step: int, count: int, size: int, seed: int) -> list[int]:
    """Return the indices of a step's examples, from data that is reshuffled every epoch.

    Args:
      step: Step, counted from 1.
      count: Number of examples in the dataset.
      size: Number of examples per step.
      seed: Seed of the order, not negative.
    """

    def at(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    first, last = (step - 1) * size, step * size
    epochs = range(first // count, (last - 1) // count + 1)
    order = np.concatenate([at(epoch) for epoch in epochs])
    begin = first - epochs[0] * count
    return order[begin : begin + size].tolist()


def prepare(
    path: pathlib.Path,
    config: settings.Config,
    processor: Processor,
    model_config: ModelConfig,
) -> None:
    """Write the episodes of `config.data.train` to `path`, their images to `pictures/` beside it.

    `path` appears once it is complete. Lines that cannot be used are reported on stderr.

    Raises:
      DataError: The files do not exist, no line can be used, or too many lines cannot be used.
      ValueError, OSError: The tools cannot be created.
    """
    files, bad, written, told = _find(config.data.train), 0, 0, 0
    shape = RowShape(1, config.update.pack_length, config.update.pack_windows)
    bar = tqdm(total=sum(1 for file in files for _ in _lines(file)), unit="story")
    with outputs.new_file(path) as partial:
        with open(partial, "w", encoding="utf-8") as out, bar:
            out.write(json.dumps({"made_with": _made_with(config)}) + "\n")
            for where, item, episode in _episodes(files, config, processor, model_config):
                bar.update()
                try:
                    if isinstance(episode, LineError):
                        raise episode
                    if isinstance(item, ScriptedEpisode):
                        _check_told(episode, item)
                    _check(episode, model_config, shape)
                except LineError as error:
                    bad += 1
                    bar.write(f"{where}: {error}; left out", file=sys.stderr)
                    if bad > config.data.max_bad_rows:
                        raise DataError(
                            f"lines that cannot be used: {bad}, more than config.data.max_bad_rows="
                            f"{config.data.max_bad_rows}; the last one is {where}: {error}"
                        ) from None
                    continue
                episode.group = episode.index = written
                line = line_of(episode, processor, path.parent, path.parent / "pictures")
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
                told += isinstance(item, ScriptedEpisode)
        if not written:
            raise DataError(f"{', '.join(map(str, files))}: no line that can be used")
    print(
        f"{path}: {written} episodes to learn from, {told} of them told; {bad} lines left out",
        file=sys.stderr,
    )


def load(path: pathlib.Path, config: settings.Config) -> list[SFTExample]:
    """Load the examples that `prepare` wrote.

    Raises:
      DataError: The file was not written by `prepare`, or with other settings.
    """
    lessons = []
    with open(path, encoding="utf-8") as file:
        try:
            made_with = checked_json.loads(next(file), _Header)["made_with"]
            ours = _made_with(config)
            odd = [name for name in ours if made_with.get(name) != ours[name]]
            if odd:
                raise DataError(
                    f"{path}: was made with config.{odd[0]}={made_with.get(odd[0])}, not "
                    f"{ours[odd[0]]}; a run is continued with the same data and settings"
                )
            for line in file:
                data = checked_json.loads(line, dict[str, Any], surrogates=True, nan=True)
                episode = Episode.from_json(data)
                files = tuple(resolve_inside(name, path.parent) for name in _texts(data, "images"))
                lessons.append(SFTExample(episode.tokens, episode.loss_mask, files))
        except DataError:
            raise
        except (StopIteration, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error!r})") from None
    return lessons


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
    lines = ((file, number, text) for file in files for number, text in _lines(file))
    rules, roots = make_rules(config, processor, model_config), config.data.image_roots
    tools_of = functools.cache(lambda index: _tools(config, index))  # saved episodes need no tools
    while batch := list(itertools.islice(lines, _AT_ONCE)):
        read = [_read(file, number, text, processor.images, roots) for file, number, text in batch]
        told: dict[pathlib.Path | None, Iterator[Episode]] = {}
        for index in {item.index for item in read if isinstance(item, ScriptedEpisode)}:
            rows = [
                item for item in read if isinstance(item, ScriptedEpisode) and item.index == index
            ]
            told[index] = iter(list(replay(rows, processor, rules, tools_of(index))))
        for (file, number, _), item in zip(batch, read, strict=True):
            episode = next(told[item.index]) if isinstance(item, ScriptedEpisode) else item
            yield f"{file}, line {number}", item, episode


def _made_with(config: settings.Config) -> dict[str, Any]:
    """Return the settings that the prepared episodes depend on, as JSON-serialisable data."""
    found: dict[str, Any] = {"data.train": config.data.train}
    for part in ("turns", "tools", "images"):
        for name, value in dataclasses.asdict(getattr(config, part)).items():
            found[f"{part}.{name}"] = value
    for name in ("pack_length", "pack_windows"):
        found[f"update.{name}"] = getattr(config.update, name)
    return json.loads(json.dumps(found))


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
    made, seconds = make_tools(config), config.tools.timeout

    def limited(action: str, tool: Tool | None) -> Tool:
        async def search(query: Query) -> Observation:
            if tool is None:
                raise LookupError(f"no tool for {action} (config.tools)")
            async with asyncio.timeout(seconds):
                return await tool(query)

        return search

    return {action: limited(action, made.get(action)) for action in ("text_search", "image_search")}


def _find(where: Sequence[str]) -> list[pathlib.Path]:
    """Return the distinct JSONL files of paths, directories and patterns, each sorted by name."""
    found: dict[pathlib.Path, None] = {}
    for item in where:
        path = pathlib.Path(item)
        names = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not path.exists():
            names = sorted(map(pathlib.Path, glob.glob(item)))
        if not names:
            raise DataError(f"{item}: no JSONL file there")
        found |= dict.fromkeys(names)
    if not found:
        raise DataError("config.data.train: no JSONL file was named")
    return list(found)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of the non-blank lines; only a newline ends a line."""
    return checked_json.jsonl_lines(path)


# Reading and checking a line


def _read(
    file: pathlib.Path,
    number: int,
    text: bytes,
    images: ImageProcessor,
    roots: Sequence[str] = (),
) -> Episode | ScriptedEpisode | LineError:
    """Return the content of a line, or the reason why it cannot be used; never raise."""
    try:
        data = checked_json.loads(text, surrogates=True, nan=True)
        if not isinstance(data, dict):
            return LineError("must be an object")
        if "segments" in data:
            return _saved(data, file.parent, images, roots)
        return _row(data, file, number, roots)
    except (LineError, ImageError) as error:
        return LineError(str(error))
    except checked_json.FormatError as error:
        return LineError(str(error))
    except ValueError as error:
        return LineError(f"cannot be read ({error})")


def _saved(
    data: dict, folder: pathlib.Path, images: ImageProcessor, roots: Sequence[str]
) -> Episode:
    """Return a saved episode with its images; raise ValueError if it cannot be used."""
    if data.get("end") == "error":
        raise LineError(f"an episode that could not be run: {data.get('error')}")
    if data.get("image_grids") and "images" not in data:
        raise LineError("an episode with pictures that does not say where they are: no 'images'")
    paths = _texts(data, "images") if data.get("images") else []
    if folder.name == "episodes":  # of a run, which keeps its images in a sibling folder
        roots = (*roots, folder.parent / "pictures")
    found = [_picture(path, folder, roots, "images") for path in paths]
    return Episode.from_json(data, [read_image(path, images) for path in found])


def _row(data: dict, file: pathlib.Path, number: int, roots: Sequence[str] = ()) -> ScriptedEpisode:
    """Return a question with its scripted turns; raise LineError if the row is invalid."""
    for field in ("question", "turns"):
        if field not in data:
            raise LineError(f"has no {field!r} (nor the 'segments' of a saved episode)")
    question, turns = data["question"], _texts(data, "turns")
    if not isinstance(question, str) or not question.strip():
        raise LineError("'question' must be a text that is not empty")
    if not turns or not all(turn.strip() for turn in turns):
        raise LineError("'turns' must be texts that are not empty, at least one")
    if data.get("image") is not None and data.get("images"):
        raise LineError("has both 'image' and 'images'")
    field = "images" if data.get("image") is None else "image"
    if field == "image":
        data = data | {"images": [data["image"]]}
    paths = _texts(data, "images") if data.get("images") else []
    name, index = data.get("id"), data.get("index")
    if not isinstance(name, (str, int, type(None))):
        raise LineError("'id' must be a text")
    if not isinstance(index, (str, type(None))):
        raise LineError("'index' must be the path of a local index")
    return ScriptedEpisode(
        Example(
            id=f"{file.name}:{number}" if name is None else str(name),
            question=question,
            images=[_picture(path, file.parent, roots, field) for path in paths],
        ),
        turns,
        None if index is None else _index(index, file.parent, roots),
    )


def _picture(
    name: str, folder: pathlib.Path, roots: Sequence[str | pathlib.Path], field: str
) -> pathlib.Path:
    """Return the path of an image that a line names; raise LineError if it is not allowed."""
    try:
        path = resolve_inside(name, folder, roots)
        check_regular(path)
        return path
    except FileRefusedError as error:
        raise LineError(f"{field!r}: {error}") from None


def _index(name: str, folder: pathlib.Path, roots: Sequence[str]) -> pathlib.Path:
    """Return the path of a local index that a line names; raise LineError if it is not allowed."""
    try:
        path = resolve_inside(name, folder, roots)
        for file in (local.FILE, "pages.jsonl"):
            if os.path.lexists(path / file):
                resolve_inside(path / file, folder, roots)
        return path
    except FileRefusedError as error:
        raise LineError(f"'index': {error}") from None


def _texts(data: dict, field: str) -> list[str]:
    values = data[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LineError(f"{field!r} must be a list of texts")
    for value in values:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LineError(f"{field!r} is not valid Unicode ({error.reason})") from None
    return values


def _check_told(episode: Episode, story: ScriptedEpisode) -> None:
    """Raise LineError if an episode was not replayed in full or lacks the results of a search."""
    if episode.end == "error":
        raise LineError(episode.error)
    for call in episode.calls:
        what = f"turns[{call.turn}]: the {call.action.replace('_', ' ')}"
        if call.status == "failed":
            raise LineError(f"{what} failed: {'; '.join(call.notes)}")
        if call.num_results and not call.num_shown:
            raise LineError(f"{what} found what is too long to be shown (turns.max_result_tokens)")
    done, wanted = len(episode.turns), len(story.texts)
    if done < wanted:
        why = {
            "answer": "that is an answer",
            "turns": "config.turns.max_turns allows no more",
            "tokens": "config.turns.max_episode_tokens leaves no room for what comes after it",
        }[episode.end]
        raise LineError(f"the episode ends with turns[{done - 1}] of {wanted}: {why}")


def _check(episode: Episode, model_config: ModelConfig, shape: RowShape) -> None:
    """Raise LineError if the policy cannot read an episode or it does not fit into a row."""
    segments, tokens = episode.segments, episode.tokens
    if not segments or segments[0].kind != "prompt" or not len(segments[0].tokens):
        raise LineError("an episode must begin with a prompt")
    if not episode.loss_mask.any():
        raise LineError("holds nothing that the policy wrote")
    most = model_config.text.vocab_size
    if tokens.max() >= most:
        raise LineError(f"token {tokens.max()} is outside the policy's vocabulary of {most}")
    places = int((tokens == model_config.image_token_id).sum())
    merged = model_config.vision.merge_size**2
    given = sum(len(image.values) // merged for image in episode.images)
    if places != given:
        raise LineError(f"has places for {places} tokens of pictures, its pictures have {given}")
    try:
        check_fits(episode.conversation, model_config, shape)
    except TooLongError as error:
        raise LineError(str(error)) from None
