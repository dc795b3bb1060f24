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
    texts = _read_texts(_BUILT_IN)
    if workflow:
        texts |= _read_texts(_BUILT_IN / workflow)
    if directory is None:
        return texts
    return texts | _load_directory(pathlib.Path(directory), workflow)


def _load_directory(directory: pathlib.Path, workflow: str) -> dict[str, str]:
    """Return the prompts of a user's directory."""
    if not directory.is_dir():
        raise PromptsError(f"{directory}: no such directory of prompts")
    texts = _read_texts(directory) or _read_published(directory)
    if not texts:
        raise PromptsError(
            f"{directory} contains no prompts: neither {', '.join(_FIELDS)} as .txt, nor published "
            "pickles"
        )
    if workflow:
        workflow_texts = _read_texts(directory / workflow)
        if workflow == "agent" and "question" in texts.keys() - workflow_texts.keys():
            raise PromptsError(
                f"{directory} replaces the prompt 'question' but lacks agent/question.txt; the "
                "workflow agent needs its own, since it differs from on_demand in that prompt alone"
            )
        texts |= workflow_texts
    for name, text in texts.items():
        (required, optional), used = _FIELDS[name], _FIELD.findall(text)
        for field in required:
            if field not in used:
                raise PromptsError(f"{directory}: prompt {name!r} lacks {{{field}}}")
        for field in used:
            if field not in required + optional:
                raise PromptsError(f"{directory}: prompt {name!r} has no field {{{field}}}")
    return texts


def _read_texts(directory: pathlib.Path) -> dict[str, str]:
    """Return the prompts that a directory has as text files."""
    paths = {name: directory / f"{name}.txt" for name in _FIELDS}
    return {name: _read_text(path) for name, path in paths.items() if path.is_file()}


def fill(template: str, fields: Mapping[str, Sequence[T | str]]) -> list[T | str]:
    """Return the parts of a prompt, with each `{field}` replaced by the parts given for it.

    Replacements are not expanded again, so a question may contain "{results}".
    """
    parts: list[T | str] = []
    for index, piece in enumerate(_FIELD.split(template)):  # texts and field names in turn
        parts += fields[piece] if index % 2 else [piece]
    return [part for part in parts if part != ""]


def _read_published(directory: pathlib.Path) -> dict[str, str]:
    prompts = {}
    for name, (prefix, template) in _PUBLISHED.items():
        paths = sorted(directory.glob(f"{prefix}*.pkl"))
        if len(paths) > 1:
            raise PromptsError(
                f"{directory} contains both {paths[0].name} and {paths[1].name}; keep one of them"
            )
        if paths:
            instruction = _unpickle_text(paths[0]).replace("<image>", "").strip()
            prompts[name] = template.replace("INSTRUCTION", instruction)
    return prompts


def _unpickle_text(path: pathlib.Path) -> str:
    try:
        value = checked_pickle.loads(_read_bytes(path))
    except checked_pickle.PickleError as error:
        raise PromptsError(f"{path}: not a pickle of text ({error})") from None
    if not isinstance(value, str):
        raise PromptsError(f"{path}: contains a {type(value).__name__}, not text")
    return value


def _read_text(path: pathlib.Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptsError(f"{path}: not UTF-8 ({error.reason})") from None


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PromptsError(f"{path} is larger than {_MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise PromptsError(f"{path}: {error.strerror or error}") from None
