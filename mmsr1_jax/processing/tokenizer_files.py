"""Loading of an HF directory's tokenizer files as `AutoTokenizer` reads them, with checks.

A `tokenizer.json` also stores state of the program that saved it: truncation, padding, and a
post-processor that adds tokens. This state is ignored. Files that would encode ordinary text
differently from `AutoTokenizer`, or let text become a control token, are rejected with an error
that names the field or token.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.checked_json import FormatError, load, loads, utf8
from mmsr1_jax.utils.logs import log

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Tags that the policy writes, or that enclose tool results, as ordinary text.
TAG_NAMES = ("reason", "answer", "search", "text_search", "information", "img")
_TAG = re.compile(rf"</?\s*(?:{'|'.join(TAG_NAMES)})\b", re.IGNORECASE)
_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")

# Pipeline that `Qwen2Tokenizer` of transformers 5 builds around vocabulary and merges, whatever the
# file specifies.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_QWEN = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": _QWEN_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            _BYTE_LEVEL,
        ],
    },
    "decoder": _BYTE_LEVEL,
}
_QWEN_MODEL = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


class TokenizerError(UserError):
    """Error for an unusable tokenizer. The message names the file and the field or token."""


_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]


class _AddedToken(TypedDict):
    id: _Id
    content: Annotated[str, msgspec.Meta(min_length=1)]


class _RequiredModel(TypedDict):
    vocab: dict[str, _Id]


class _Model(_RequiredModel, total=False):
    type: Literal["BPE"] | None
    merges: list[str | tuple[str, str]]
    dropout: float | None
    unk_token: str | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    byte_fallback: bool | None
    ignore_merges: bool | None


class _RequiredTokenizer(TypedDict):
    model: _Model


class _Tokenizer(_RequiredTokenizer, total=False):
    added_tokens: list[_AddedToken] | None
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None


def read(directory: str | pathlib.Path) -> str:
    """Return the contents of a `tokenizer.json` that encodes text as `AutoTokenizer` would.

    The source is the directory's `tokenizer.json`, else the conversion by `transformers` of an
    older `vocab.json` and `merges.txt`. Warnings report files and fields that are ignored.

    Raises:
      TokenizerError: If there is no tokenizer or it cannot be used. The message names file and
        field.
    """
    directory = pathlib.Path(directory)
    path = directory / FILE
    if not path.is_file():
        return _convert_slow(directory)
    try:
        raw = load(path, dict[str, Any])
        settings_path = directory / SETTINGS
        settings = _settings(settings_path) if settings_path.is_file() else {}
        _compare_vocabulary(directory, raw)
        _check_declared(directory, settings, raw)
        name = settings.get("tokenizer_class") or _class_of_model(directory)
    except FormatError as error:
        raise TokenizerError(str(error)) from None
    if settings.get("add_prefix_space"):
        raise TokenizerError(f"{settings_path}: add_prefix_space=true is not supported")
    if name in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raw = _as_qwen(path, raw)
    return json.dumps(raw, ensure_ascii=False)


def validate(text: str) -> dict[str, Any]:
    """Return the contents of a `tokenizer.json` after checking them, without its state.

    Raises:
      TokenizerError: If the contents cannot be used. The message names the field or the token.
    """
    try:
        raw = loads(text, dict[str, Any])
        file = msgspec.convert(raw, _Tokenizer)
    except (FormatError, msgspec.ValidationError) as error:
        raise TokenizerError(f"{FILE}: {error}") from None
    try:
        _check_pipeline(file)
        _check_model(file["model"])
        _check_added(file)
    except TokenizerError as error:
        raise TokenizerError(f"{FILE}: {error}") from None
    return raw | {"truncation": None, "padding": None, "post_processor": None}


def byte_alphabet() -> dict[str, int]:
    """Return the characters of a byte-level vocabulary, each with the byte that it represents.

    Bytes that are printable in Latin-1 represent themselves. The others are assigned consecutive
    characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def without_added_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `checked` contents without added tokens, including those in the vocabulary."""
    control = {to_byte_level(token["content"]) for token in raw.get("added_tokens") or []}
    model = raw["model"]
    vocabulary = {t: token_id for t, token_id in model["vocab"].items() if t not in control}
    return raw | {"added_tokens": [], "model": model | {"vocab": vocabulary}}


def to_byte_level(text: str) -> str:
    """Return text in the characters of a byte-level vocabulary."""
    letters = {byte: character for character, byte in byte_alphabet().items()}
    return "".join(letters[byte] for byte in utf8(text))


def _check_pipeline(file: _Tokenizer) -> None:
    """Check that the pipeline changes text only by NFC and that tokens are sequences of bytes."""
    for step in _steps(file.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise TokenizerError(f"normalizer: {step.get('type')!r} is not supported, only NFC")
    steps = list(_steps(file.get("pre_tokenizer"), "pretokenizers"))
    for step in steps:
        kind = step.get("type")
        if kind not in ("ByteLevel", "Split", "Digits") or step.get("behavior") == "Removed":
            raise TokenizerError(f"pre_tokenizer: {kind!r} is not supported in a byte-level BPE")
        if kind == "ByteLevel" and step.get("add_prefix_space", True):
            raise TokenizerError("pre_tokenizer: add_prefix_space=true is not supported")
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise TokenizerError("pre_tokenizer: must end with ByteLevel")
    decoder = file.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"decoder: {decoder.get('type')!r} is not supported, only ByteLevel")


def _steps(part: dict[str, Any] | None, field: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer or pre-tokenizer, with sequences flattened."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise TokenizerError(f"{field}: each must be an object")
    if part.get("type") != "Sequence":
        yield part
        return
    parts = part.get(field)
    if not isinstance(parts, list):
        raise TokenizerError(f"{field}: must be a list")
    for inner in parts:
        yield from _steps(inner, field)


def _check_model(model: _Model) -> None:
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := model.get(field):
            raise TokenizerError(f"model.{field}={value!r} is not supported")
    vocabulary, alphabet = model["vocab"], byte_alphabet()
    if len(set(vocabulary.values())) != len(vocabulary):
        raise TokenizerError("model.vocab: two tokens have the same id")
    for token in vocabulary:
        if not alphabet.keys() >= set(token):
            raise TokenizerError(
                f"model.vocab: {token!r} contains characters outside the byte-level alphabet"
            )
    unknown = model.get("unk_token")
    if unknown is not None and not vocabulary.keys() >= alphabet.keys():
        raise TokenizerError(
            f"model.unk_token={unknown!r}: some bytes have no token and would become it"
        )


def _check_added(file: _Tokenizer) -> None:
    model, added = file["model"], file.get("added_tokens") or []
    vocabulary = model["vocab"]
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    merges = model.get("merges") or []
    # Ordinary text can become a control token only through merges, as no control token is one byte.
    products = {"".join(m) if isinstance(m, tuple) else m.replace(" ", "") for m in merges}
    seen: dict[str | int, str] = {}
    for token in added:
        content, token_id = token["content"], token["id"]
        _check_name(content)
        if content in seen or token_id in seen:
            raise TokenizerError(f"added_tokens: {content!r} (id {token_id}) occurs twice")
        seen |= {content: content, token_id: content}
        encoded = to_byte_level(content)
        if tokens.get(token_id, content) not in (content, encoded):
            raise TokenizerError(
                f"added_tokens: {content!r} has id {token_id}, which is {tokens[token_id]!r} in "
                "model.vocab"
            )
        if vocabulary.get(content, token_id) != token_id:
            raise TokenizerError(
                f"added_tokens: {content!r} has id {token_id}, but {vocabulary[content]} in "
                "model.vocab"
            )
        if encoded in products:
            raise TokenizerError(
                f"added_tokens: ordinary text can become {content!r} (model.merges)"
            )


def _check_name(content: str) -> None:
    """Raise TokenizerError for an added token that must be encoded as ordinary text."""
    if _TAG.search(content):
        raise TokenizerError(
            f"added token {content!r} is a tag of a turn: the policy must write tags as ordinary "
            "text, since added tokens are never sampled; use a tokenizer without this token"
        )
    if not _MARKUP.fullmatch(content):
        raise TokenizerError(
            f"added token {content!r} is ordinary text, which is encoded without added tokens "
            "here; only tokens in angle or square brackets can be added tokens"
        )


def _check_declared(directory: pathlib.Path, settings: dict[str, Any], raw: dict[str, Any]) -> None:
    """Check the tokens that `AutoTokenizer` adds from files other than `tokenizer.json`."""
    added = raw.get("added_tokens") or []
    known = {t.get("content"): t.get("id") for t in added if isinstance(t, dict)}
    sources = [(SETTINGS, settings)]
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (directory / name).is_file():
            sources.append((name, _settings(directory / name)))
    for name, data in sources:
        for content, token_id in _declared(data, is_map=name == "added_tokens.json"):
            try:
                if content not in known:
                    _check_name(content)
                elif token_id is not None and token_id != known[content]:
                    raise TokenizerError(
                        f"token {content!r} has id {token_id}, but {known[content]} in {FILE}"
                    )
            except TokenizerError as error:
                raise TokenizerError(f"{directory / name}: {error}") from None


def _declared(data: dict[str, Any], is_map: bool) -> Iterator[tuple[str, int | None]]:
    """Yield the tokens that a settings file declares, each with its id or None.

    Args:
      data: Contents of the file.
      is_map: Whether the file maps tokens to ids, as `added_tokens.json` does.
    """
    if is_map:
        yield from data.items()
        return
    decoder = data.get("added_tokens_decoder")
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        yield from ((c, int(token_id)) for c in _contents(token) if token_id.isdecimal())
    for field, value in data.items():
        if field.endswith("_token") or field in (
            "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"
        ):  # fmt: skip
            yield from ((content, None) for content in _contents(value))


def _contents(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict) and "content" in value:
        yield from _contents(value["content"])
    elif isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        yield from itertools.chain.from_iterable(map(_contents, parts))


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return load(path, dict[str, Any], large=True)  # `model_max_length` is int(1e30) if unlimited


def _class_of_model(directory: pathlib.Path) -> str | None:
    """Return the class implied by `config.json`, or None if that file does not exist.

    Used if `tokenizer_config.json` names no class.
    """
    path = directory / "config.json"
    if not path.is_file():
        return None
    return _settings(path).get("tokenizer_class") or "Qwen2Tokenizer"


def _as_qwen(path: pathlib.Path, raw: dict[str, Any]) -> dict[str, Any]:
    model = raw.get("model")
    if not isinstance(model, dict):
        raise TokenizerError(f"{path}: model: must be an object")
    expected = _QWEN | {"decoder": {"type": "ByteLevel"}}  # its other fields have no effect
    changed = [field for field in expected if not _equivalent(raw.get(field), expected[field])]
    changed += [
        f"model.{f}" for f, x in _QWEN_MODEL.items() if (model.get(f) or None) != (x or None)
    ]
    if changed:
        log.warning(
            "%s: replacing %s by those of Qwen2Tokenizer, as transformers does (the class is "
            "named by %s, or is its default)", path, ", ".join(changed), SETTINGS,
        )  # fmt: skip
    return raw | _QWEN | {"model": model | _QWEN_MODEL}


def _equivalent(part: Any, expected: Any) -> bool:
    """Return whether a part of a tokenizer is as expected, ignoring the unused offsets."""
    if isinstance(expected, dict) and isinstance(part, dict):
        keys = expected.keys() - {"trim_offsets"}
        return all(_equivalent(part.get(key), expected[key]) for key in keys)
    if isinstance(expected, list) and isinstance(part, list):
        return len(part) == len(expected) and all(map(_equivalent, part, expected))
    return part == expected


def _compare_vocabulary(directory: pathlib.Path, raw: dict[str, Any]) -> None:
    path, model = directory / "vocab.json", raw.get("model")
    if not path.is_file() or not isinstance(model, dict):
        return
    if load(path) != model.get("vocab"):
        log.warning("%s: differs from %s, which is used, as transformers does", path, FILE)


def _convert_slow(directory: pathlib.Path) -> str:
    """Return the `tokenizer.json` that `transformers` builds from `vocab.json` and `merges.txt`."""
    if not directory.is_dir():
        raise TokenizerError(f"{directory}: no such directory")
    if not (directory / "vocab.json").is_file():
        raise TokenizerError(f"{directory}: contains neither {FILE} nor vocab.json and merges.txt")
    from transformers import AutoTokenizer  # slow to import and needed only here

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers has no single error for this
        reason = str(error).split("\n")[0]
        raise TokenizerError(
            f"{directory}: vocab.json and merges.txt cannot be converted ({reason})"
        ) from None
