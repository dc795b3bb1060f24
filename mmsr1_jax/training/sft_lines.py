"""Lines of an SFT dataset: reading and checking them.

A line is a saved episode or a question with scripted turns, see `sft_dataset`.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.episodes.scripted import ScriptedEpisode
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.batching import TooLongError
from mmsr1_jax.processing.images import ImageError, ImageProcessor, read_image
from mmsr1_jax.rl.packing import RowShape, check_fits
from mmsr1_jax.tools.index_builder import INDEX_FILE
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.files import FileRefusedError, check_regular, resolve_inside


class LineError(UserError):
    """Line that cannot be used for training; the message gives the reason."""


def read_line(
    file: pathlib.Path,
    line_number: int,
    text: bytes,
    images: ImageProcessor,
    roots: Sequence[str | pathlib.Path] = (),
) -> Episode | ScriptedEpisode | LineError:
    """Return the content of a line, or the reason why it cannot be used; never raise."""
    try:
        data: Any = checked_json.loads(text, surrogates=True, nan=True)
        if not isinstance(data, dict):
            return LineError("must be an object")
        if "segments" in data:
            return read_saved_episode(data, file.parent, images, roots)
        return read_scripted_episode(data, file, line_number, roots)
    except (LineError, ImageError) as error:
        return LineError(str(error))
    except checked_json.FormatError as error:
        return LineError(str(error))
    except ValueError as error:
        return LineError(f"cannot be read ({error})")


def read_saved_episode(
    data: dict[str, Any],
    folder: pathlib.Path,
    images: ImageProcessor,
    roots: Sequence[str | pathlib.Path],
) -> Episode:
    """Return a saved episode with its images; raise ValueError if it cannot be used."""
    if data.get("end") == "error":
        raise LineError(f"an episode that could not be run: {data.get('error')}")
    if data.get("image_grids") and "images" not in data:
        raise LineError("a saved episode with images lacks 'images', the paths of its image files")
    paths = string_list(data, "images") if data.get("images") else []
    if folder.name == "episodes":  # of a run, which keeps its images in a sibling folder
        roots = (*roots, folder.parent / "images")
    image_paths = [_image_path(path, folder, roots, "images") for path in paths]
    return Episode.from_json(data, [read_image(path, images) for path in image_paths])


def read_scripted_episode(
    data: dict[str, Any],
    file: pathlib.Path,
    line_number: int,
    roots: Sequence[str | pathlib.Path] = (),
) -> ScriptedEpisode:
    """Return a question with its scripted turns; raise LineError if the row is invalid."""
    for field in ("question", "turns"):
        if field not in data:
            raise LineError(f"has no {field!r} (nor the 'segments' of a saved episode)")
    question, turns = data["question"], string_list(data, "turns")
    if not isinstance(question, str) or not question.strip():
        raise LineError("'question' must be a non-empty string")
    if not turns or not all(turn.strip() for turn in turns):
        raise LineError("'turns' must be a list of one or more non-empty strings")
    if data.get("image") is not None and data.get("images"):
        raise LineError("has both 'image' and 'images'")
    field = "images" if data.get("image") is None else "image"
    if field == "image":
        data = data | {"images": [data["image"]]}
    paths = string_list(data, "images") if data.get("images") else []
    name, index = data.get("id"), data.get("index")
    if not isinstance(name, (str, int, type(None))):
        raise LineError("'id' must be a string")
    if not isinstance(index, (str, type(None))):
        raise LineError("'index' must be the path of a local index")
    return ScriptedEpisode(
        Example(
            id=f"{file.name}:{line_number}" if name is None else str(name),
            question=question,
            images=[_image_path(path, file.parent, roots, field) for path in paths],
        ),
        turns,
        None if index is None else _index_path(index, file.parent, roots),
    )


def _image_path(
    name: str, folder: pathlib.Path, roots: Sequence[str | pathlib.Path], field: str
) -> pathlib.Path:
    """Return the path of an image that a line names; raise LineError if it is not allowed."""
    try:
        path = resolve_inside(name, folder, roots)
        check_regular(path)
        return path
    except FileRefusedError as error:
        raise LineError(f"{field!r}: {error}") from None


def _index_path(
    name: str, folder: pathlib.Path, roots: Sequence[str | pathlib.Path]
) -> pathlib.Path:
    """Return the path of a local index that a line names; raise LineError if it is not allowed."""
    try:
        path = resolve_inside(name, folder, roots)
        for file in (INDEX_FILE, "pages.jsonl"):
            if os.path.lexists(path / file):
                resolve_inside(path / file, folder, roots)
        return path
    except FileRefusedError as error:
        raise LineError(f"'index': {error}") from None


def string_list(data: dict[str, Any], field: str) -> list[str]:
    """Return a field that must be a list of valid strings; raise LineError if it is not."""
    values = data[field]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LineError(f"{field!r} must be a list of strings")
    for value in values:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LineError(f"{field!r} is not valid Unicode ({error.reason})") from None
    return values


def check_replay(episode: Episode, scripted: ScriptedEpisode) -> None:
    """Raise LineError if an episode was not replayed in full or lacks the results of a search."""
    if episode.end == "error":
        raise LineError(episode.error)
    for call in episode.calls:
        search = f"turns[{call.turn}]: the {call.action.replace('_', ' ')}"
        if call.status == "failed":
            raise LineError(f"{search} failed: {'; '.join(call.notes)}")
        if call.num_results and not call.num_shown:
            raise LineError(f"{search} returned only results longer than turns.max_result_tokens")
    num_turns, num_scripted = len(episode.turns), len(scripted.texts)
    if num_turns < num_scripted:
        reason = {
            "answer": "that turn answers",
            "turns": "config.turns.max_turns allows no more",
            "tokens": "config.turns.max_episode_tokens leaves no tokens for the next turn",
        }.get(episode.end or "", "it has no end")
        raise LineError(f"the episode ends with turns[{num_turns - 1}] of {num_scripted}: {reason}")


def check_episode(episode: Episode, model_config: ModelConfig, shape: RowShape) -> None:
    """Raise LineError if the policy cannot read an episode or it does not fit into a row."""
    segments, tokens = episode.segments, episode.tokens
    if not segments or segments[0].kind != "prompt" or not len(segments[0].tokens):
        raise LineError("an episode must begin with a prompt")
    if not episode.loss_mask.any():
        raise LineError("has no tokens that the policy wrote, so there is nothing to train on")
    vocab_size = model_config.text.vocab_size
    if tokens.max() >= vocab_size:
        raise LineError(f"token {tokens.max()} is outside the policy's vocabulary of {vocab_size}")
    num_placeholders = int((tokens == model_config.image_token_id).sum())
    merged = model_config.vision.merge_size**2
    num_image_tokens = sum(len(image.values) // merged for image in episode.images)
    if num_placeholders != num_image_tokens:
        raise LineError(
            f"has placeholders for {num_placeholders} image tokens, but its images have "
            f"{num_image_tokens}"
        )
    try:
        check_fits(episode.conversation, model_config, shape)
    except TooLongError as error:
        raise LineError(str(error)) from None
