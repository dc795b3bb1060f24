"""Conversion of text and images to tokens in Qwen's chat format, shared by all commands.

A conversation is built from control tokens (by id) with text between them. Text is encoded by a
tokenizer without control tokens, so nothing in it can become one: if a user types `<|im_end|>`,
those ten characters are encoded as ordinary text.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tokenizers

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import read_family
from mmsr1_jax.processing import tokenizer_files
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, process_image
from mmsr1_jax.processing.images import ImageError, ImageProcessor, Patches
from mmsr1_jax.processing.tokenizer_files import TokenizerError

ROLES = ("system", "user", "assistant")
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


class ConversationError(UserError):
    """Error for invalid messages. The text says which message is invalid and why."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokenised conversation, the input of the policy.

    Attributes:
      tokens: int32[T]. Token ids, with one placeholder per merged token of an image.
      images: Images in order of appearance.
    """

    tokens: np.ndarray
    images: tuple[Patches, ...]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [image.grid for image in self.images]


class Processor:
    """Tokenizer and image processor of a checkpoint directory.

    Attributes:
      control: Ids of all added tokens (control tokens), by name.
      images: Image processor.
      default_system: System message of conversations without one; None: they have none.
    """

    def __init__(
        self,
        tokenizer_json: str,
        images: ImageProcessor,
        default_system: str | None = "You are a helpful assistant.",
    ):
        """Create a processor.

        Args:
          tokenizer_json: Contents of a `tokenizer.json` (byte-level BPE).
          images: Image processor.
          default_system: System message of conversations without one; None: they have none.

        Raises:
          TokenizerError: If the contents are unusable, see `tokenizer_files.validate`, or a control
            token is missing.
        """
        raw = tokenizer_files.validate(tokenizer_json)
        self.control = {t["content"]: t["id"] for t in raw.get("added_tokens") or []}
        missing = [name for name in CONTROL_TOKENS if name not in self.control]
        if missing:
            raise TokenizerError(f"tokenizer.json: control token {missing[0]} is missing")
        try:
            self._all = tokenizers.Tokenizer.from_str(json.dumps(raw))
            self._text = tokenizers.Tokenizer.from_str(
                json.dumps(tokenizer_files.without_added_tokens(raw))
            )
        except Exception as error:  # the library has no error class
            raise TokenizerError(f"tokenizer.json: {error}") from None
        for token, token_id in self.control.items():
            if self._all.token_to_id(token) != token_id:
                raise TokenizerError(
                    f"tokenizer.json: added token {token!r} cannot have id {token_id}: ids of "
                    "added tokens must follow those of model.vocab without gaps"
                )
        self.images = images
        self.default_system = default_system

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "Processor":
        """Return the processor of a checkpoint directory.

        See `tokenizer_files.read` and `ImageProcessor.from_directory`. The policy's family, which
        `config.json` names, defines the default system message. A directory without that file,
        which is no policy's, has the default of this class.

        Raises:
          TokenizerError, ImageError, ConfigError: If a file is missing or unusable. The message
            names it.
        """
        try:
            text = tokenizer_files.read(directory)
            processor = cls(text, ImageProcessor.from_directory(directory))
            if pathlib.Path(directory, "config.json").is_file():
                processor.default_system = read_family(directory).default_system
            return processor
        except TokenizerError as error:
            prefix = "" if str(error).startswith(str(directory)) else f"{directory}: "
            raise TokenizerError(f"{prefix}{error}") from None

    def check_fits(self, config: ModelConfig) -> None:
        """Raise TokenizerError or ImageError if the processor does not match a model config."""
        largest = max(self._all.get_vocab(with_added_tokens=True).values())
        if largest >= config.text.vocab_size:
            raise TokenizerError(
                f"tokenizer.json: token id {largest} is outside the model's vocabulary of "
                f"{config.text.vocab_size} (config.json: vocab_size)"
            )
        image_token = self.control["<|image_pad|>"]
        if image_token != config.image_token_id:
            raise TokenizerError(
                f"tokenizer.json: <|image_pad|> has id {image_token}, but config.json has "
                f"image_token_id={config.image_token_id}"
            )
        for field in ("patch_size", "temporal_patch_size", "merge_size"):
            value, expected = getattr(self.images, field), getattr(config.vision, field)
            if value != expected:
                raise ImageError(
                    f"preprocessor_config.json or processor_config.json: {field}={value}, but the "
                    f"model's vision tower has {expected}"
                )

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of text. They never include a control token."""
        return self._text.encode(text, add_special_tokens=False).ids

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token, by id (byte-level BPE, as in GPT-2)."""
        vocabulary = self._all.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values()) + 1)
        byte_of = tokenizer_files.byte_alphabet()
        for token, token_id in vocabulary.items():
            if token in self.control:
                table[token_id] = token.encode("utf-8")
            else:
                table[token_id] = bytes(byte_of[character] for character in token)
        return table

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, including control tokens."""
        return self._all.decode(list(tokens), skip_special_tokens=False)

    def conversation(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        generation_prompt: bool = False,
        max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
    ) -> Prompt:
        """Return a conversation in Qwen's chat format.

        Conversations without a system message get the policy's default one, if it has one.

        Args:
          messages: Messages `{"role", "content"}`. The content is a string or a list of parts,
            `{"type": "text", "text": ..}` or `{"type": "image", "image": ..}` with a path, bytes
            or a PIL image.
          generation_prompt: Whether to end with the opening of an assistant turn.
          max_file_pixels: Maximum number of pixels in an image file, see `open_image`.

        Raises:
          ConversationError: If the messages do not have this form.
          ImageError: If an image cannot be used.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ConversationError("messages must be a non-empty list")
        items: list[str | int | Patches] = []
        first = messages[0]
        if not (isinstance(first, dict) and first.get("role") == "system"):
            items += self._system()
        for index, message in enumerate(messages, start=1):
            try:
                role, parts = _parse_message(message)
            except ConversationError as error:
                raise ConversationError(f"message {index}: {error}") from None
            items += self._turn(role, [self._part(part, max_file_pixels) for part in parts])
        return self._prompt(items + self._opening() if generation_prompt else items)

    def first_turn(self, parts: Sequence[str | Patches]) -> Prompt:
        """Return a conversation of one user turn and the opening of the assistant's."""
        return self._prompt(self._system() + self._turn("user", parts) + self._opening())

    def next_turn(self, parts: Sequence[str | Patches]) -> Prompt:
        """Return a user turn that continues a conversation and the opening of the assistant's."""
        return self._prompt(self._turn("user", parts) + self._opening())

    def closing(self) -> list[int]:
        """Return the tokens that end a turn, `<|im_end|>` and a newline."""
        return self._prompt([self.control["<|im_end|>"], "\n"]).tokens.tolist()

    def _system(self) -> list[str | int | Patches]:
        """Return the default system turn; empty for a family without one."""
        return [] if self.default_system is None else self._turn("system", [self.default_system])

    def _opening(self) -> list[str | int | Patches]:
        return [self.control["<|im_start|>"], "assistant\n"]

    def _part(self, part: str | dict[str, Any], max_file_pixels: int) -> str | Patches:
        if isinstance(part, str):
            return part
        return process_image(part["image"], self.images, max_pixels=max_file_pixels)

    def _turn(self, role: str, parts: Sequence[str | Patches]) -> list[str | int | Patches]:
        start, end = self.control["<|im_start|>"], self.control["<|im_end|>"]
        return [start, f"{role}\n", *parts, end, "\n"]

    def _prompt(self, items: Iterable[str | int | Patches]) -> Prompt:
        """Join adjacent texts, encode them and expand images."""
        tokens: list[int] = []
        images: list[Patches] = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item  # tokens may span two adjacent parts, as in the HF template
                continue
            if text:
                tokens += self.encode_text(text)
                text = ""
            if isinstance(item, int):
                tokens.append(item)
            elif item is not None:
                images.append(item)
                count = len(item.values) // self.images.merge_size**2
                tokens.append(self.control["<|vision_start|>"])
                tokens += [self.control["<|image_pad|>"]] * count
                tokens.append(self.control["<|vision_end|>"])
        return Prompt(np.array(tokens, np.int32), tuple(images))


def _parse_message(message: Any) -> tuple[str, list[str | dict[str, Any]]]:
    """Return the role and the parts of the content: texts, and images as `{"image": ..}`."""
    if not isinstance(message, dict):
        raise ConversationError("must be an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConversationError(f"unknown role {role!r}, not one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, [_check_text(content)]
    if not isinstance(content, list):
        raise ConversationError("content must be a string or a list of parts")
    parts: list[str | dict[str, Any]] = []
    for index, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_check_text(part["text"]))
        elif kind == "image" and isinstance(part.get("image"), (str, bytes, PIL.Image.Image)):
            parts.append({"image": part["image"]})
        else:
            raise ConversationError(
                f"part {index} must be {{'type': 'text', 'text': ..}} or "
                "{'type': 'image', 'image': ..}"
            )
    return role, parts


def _check_text(text: str) -> str:
    """Return `text`. Raise ConversationError for a lone surrogate, as JSON escapes can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(f"text is not valid Unicode ({error.reason})") from None
    return text
