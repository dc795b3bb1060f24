"""Prompt templates: text files with fields, in `prompts/` beside this file.

    question             first user turn                     {question} {images}
    after_image_search   after an image search with results  {results} {question}
    after_text_search    after a text search with results    {results} {question}
    search_failed        after a search without results      {reason} {question}
    over_limit           after a refused search              {reason} {question}
    malformed            after a turn without an action      {reason} {question}

A workflow other than the trained one (`evaluation/workflows.py`) may have templates of its own, in
a subdirectory with its name. A user's directory may replace any template. The published prompts are
pickles of one string each, which contains only the instruction. They are read as data, without
executing code, and the text around the instruction is added here.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import checked_pickle

_BUILT_IN = pathlib.Path(__file__).parent / "prompts"
# Required and optional fields of each prompt.
_FIELDS = {
    "question": (("question", "images"), ()),
    "after_image_search": (("results",), ("question",)),
    "after_text_search": (("results",), ("question",)),
    "search_failed": (("reason",), ("question",)),
    "over_limit": (("reason",), ("question",)),
    "malformed": ((), ("reason", "question")),
}
_FIELD = re.compile(r"\{(question|images|results|reason)\}")
_RESULTS = "<information>\n[KIND Search Results]\n{results}\n</information>\n"
_RESULTS += "Original question: {question}\nINSTRUCTION"
# Beginning of the file name, and the template around the instruction in the file.
_PUBLISHED = {
    "question": ("round_1_user_prompt", "INSTRUCTION\nQuestion: {question}\nImage: {images}"),
    "after_image_search": ("after_image_search_prompt", _RESULTS.replace("KIND", "Image")),
    "after_text_search": ("after_text_search_prompt", _RESULTS.replace("KIND", "Text")),
}
_MAX_BYTES = 1_000_000

T = TypeVar("T")


class PromptsError(UserError):
    """An unusable prompt; the message names the file."""


def load(directory: str | pathlib.Path | None = None, workflow: str = "") -> dict[str, str]:
    """Return all prompts by name: the built-in ones, overridden by those of a directory.

    The order of precedence is: the directory's prompts for the workflow, the directory's general
    ones, the built-in ones for the workflow, the built-in general ones.

    Args:
      directory: Directory of `NAME.txt` files, or of published pickles
        (`round_1_user_prompt*.pkl` ..).
      workflow: Workflow whose own prompts are used too.

    Raises:
      PromptsError: The directory is missing or has no prompts, or a prompt is unreadable, lacks a
        required field or has one of another prompt; or the directory has a `question` prompt, but
        none for the workflow `agent`.
    """
    found = _texts(_BUILT_IN)
    if workflow:
        found |= _texts(_BUILT_IN / workflow)
    if directory is None:
        return found
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise PromptsError(f"{directory}: no such directory of prompts")
    replaced = _texts(directory)
    if not replaced:
        replaced = _published(directory)
    if not replaced:
        raise PromptsError(
            f"{directory}: neither {', '.join(_FIELDS)} as .txt, nor pickled prompts"
        )
    if workflow:
        own = _texts(directory / workflow)
        if workflow == "agent" and "question" in replaced.keys() - own.keys():
            raise PromptsError(
                f"{directory}: has a question prompt of its own, so the workflow agent, which is "
                "told apart by that alone, wants one too: agent/question.txt"
            )
        replaced |= own
    for name, text in replaced.items():
        (needed, allowed), used = _FIELDS[name], _FIELD.findall(text)
        for field in needed:
            if field not in used:
                raise PromptsError(f"{directory}: prompt {name!r} lacks {{{field}}}")
        for field in used:
            if field not in needed + allowed:
                raise PromptsError(f"{directory}: prompt {name!r} has no use for {{{field}}}")
    return found | replaced


def _texts(directory: pathlib.Path) -> dict[str, str]:
    """Return the prompts that a directory has as text files."""
    paths = {name: directory / f"{name}.txt" for name in _FIELDS}
    return {name: _read(path) for name, path in paths.items() if path.is_file()}


def fill(template: str, fields: Mapping[str, Sequence[T | str]]) -> list[T | str]:
    """Return the parts of a prompt, with each `{field}` replaced by the parts given for it.

    Replacements are not expanded again, so a question may contain "{results}".
    """
    parts: list[T | str] = []
    for number, piece in enumerate(_FIELD.split(template)):
        parts += fields[piece] if number % 2 else [piece]
    return [part for part in parts if part != ""]


def _published(directory: pathlib.Path) -> dict[str, str]:
    prompts = {}
    for name, (beginning, around) in _PUBLISHED.items():
        paths = sorted(directory.glob(f"{beginning}*.pkl"))
        if len(paths) > 1:
            raise PromptsError(f"{directory}: {paths[0].name} or {paths[1].name}? Keep one of them")
        if paths:
            instruction = _unpickled_text(paths[0]).replace("<image>", "").strip()
            prompts[name] = around.replace("INSTRUCTION", instruction)
    return prompts


def _unpickled_text(path: pathlib.Path) -> str:
    try:
        value = checked_pickle.loads(_bytes(path))
    except checked_pickle.PickleError as error:
        raise PromptsError(f"{path}: not a pickle of text ({error})") from None
    if not isinstance(value, str):
        raise PromptsError(f"{path}: holds a {type(value).__name__}, not text")
    return value


def _read(path: pathlib.Path) -> str:
    try:
        return _bytes(path).decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: not UTF-8 ({error.reason})") from None


def _bytes(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PromptsError(f"{path}: more than {_MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise PromptsError(f"{path}: {error.strerror or error}") from None
