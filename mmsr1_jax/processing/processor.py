"""Text and pictures to tokens, in Qwen's chat format: the one implementation, used by all commands.

A conversation is built as control tokens (by id) with text between them. Text is encoded by a
tokenizer that knows no control tokens at all, so nothing in it can ever become one (law 6): a user
who types `<|im_end|>` gets those ten characters.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tokenizers

from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.processing import tokenizer_files
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, process_image
from mmsr1_jax.processing.images import ImageError, ImageProcessor, Patches
from mmsr1_jax.processing.tokenizer_files import TokenizerError

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful assistant."
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


class ConversationError(ValueError):
    """Messages that are not a conversation; the message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as the policy reads it.

    Attributes:
      tokens: int32[T], images expanded to one placeholder a merged token.
      images: in order of appearance.
    """

    tokens: np.ndarray
    images: tuple[Patches, ...]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [image.grid for image in self.images]


class Processor:
    """Tokenizer and image processor of a checkpoint directory.

    Attributes:
      control: id of every added token (control token), by name.
      images: the image processor.
    """

    def __init__(self, tokenizer_json: str, images: ImageProcessor):
        """Args: the contents of a `tokenizer.json` (byte-level BPE), and the image processor.

        Raises:
          TokenizerError: see `tokenizer_files.checked`; or a control token is missing.
        """
        raw = tokenizer_files.checked(tokenizer_json)
        self.control = {t["content"]: t["id"] for t in raw.get("added_tokens") or []}
        missing = [name for name in CONTROL_TOKENS if name not in self.control]
        if missing:
            raise TokenizerError(f"tokenizer.json: control token {missing[0]} is missing")
        try:
            self._all = tokenizers.Tokenizer.from_str(json.dumps(raw))
            self._text = tokenizers.Tokenizer.from_str(
                json.dumps(tokenizer_files.without_control(raw))
            )
        except Exception as error:  # the library has no class of errors
            raise TokenizerError(f"tokenizer.json: {error}") from None
        for token, number in self.control.items():
            if self._all.token_to_id(token) != number:
                raise TokenizerError(
                    f"tokenizer.json: added token {token!r} cannot have id {number}: ids of added "
                    "tokens must follow those of model.vocab without gaps"
                )
        self.images = images

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "Processor":
        """Return the processor of a directory, see `tokenizer_files.read` and
        `ImageProcessor.from_directory`.

        Raises:
          TokenizerError, ImageError: a file is missing or unusable; the message names it.
        """
        try:
            text = tokenizer_files.read(directory)
            return cls(text, ImageProcessor.from_directory(directory))
        except TokenizerError as error:
            prefix = "" if str(error).startswith(str(directory)) else f"{directory}: "
            raise TokenizerError(f"{prefix}{error}") from None

    def check_fits(self, config: ModelConfig) -> None:
        """Raises TokenizerError or ImageError where the directory's files do not fit together."""
        largest = max(self._all.get_vocab(with_added_tokens=True).values())
        if largest >= config.text.vocab_size:
            raise TokenizerError(
                f"tokenizer.json: token id {largest} is outside the model's vocabulary of "
                f"{config.text.vocab_size} (config.json: vocab_size)"
            )
        image_token = self.control["<|image_pad|>"]
        if image_token != config.image_token_id:
            raise TokenizerError(
                f"tokenizer.json: <|image_pad|> is {image_token}, but config.json says "
                f"image_token_id={config.image_token_id}"
            )
        for field in ("patch_size", "temporal_patch_size", "merge_size"):
            ours, model = getattr(self.images, field), getattr(config.vision, field)
            if ours != model:
                raise ImageError(
                    f"preprocessor_config.json or processor_config.json: {field}={ours}, but the "
                    f"model's vision tower has {model}"
                )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text; never a control token, whatever the text."""
        return self._text.encode(text, add_special_tokens=False).ids

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for, by id (byte-level BPE, as GPT-2's)."""
        vocabulary = self._all.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values()) + 1)
        byte_of = tokenizer_files.byte_alphabet()
        for token, number in vocabulary.items():
            if token in self.control:
                table[number] = token.encode("utf-8")
            else:
                table[number] = bytes(byte_of[character] for character in token)
        return table

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, control tokens written out."""
        return self._all.decode(list(tokens), skip_special_tokens=False)

    def conversation(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        generation_prompt: bool = False,
        max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
    ) -> Prompt:
        """A conversation in Qwen's chat format, with its default system message if it has none.

        Args:
          messages: `{"role", "content"}`; the content is a string or a list of parts,
            `{"type": "text", "text": ..}` or `{"type": "image", "image": ..}` with a path, bytes
            or a PIL image.
          generation_prompt: end with the opening of an assistant turn.
          max_file_pixels: see `open_image`.

        Raises:
          ConversationError: not in that form.
          ImageError: a picture that cannot be used.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ConversationError("messages must be a list that is not empty")
        items: list[str | int | Patches] = []
        first = messages[0]
        if not (isinstance(first, dict) and first.get("role") == "system"):
            items += self._turn("system", [DEFAULT_SYSTEM])
        for number, message in enumerate(messages, start=1):
            try:
                role, parts = _parse_message(message)
            except ConversationError as error:
                raise ConversationError(f"message {number}: {error}") from None
            items += self._turn(role, [self._part(part, max_file_pixels) for part in parts])
        return self._prompt(items + self._opening() if generation_prompt else items)

    def first_turn(self, parts: Sequence[str | Patches]) -> Prompt:
        """A conversation of one user turn, and the opening of the policy's."""
        items = self._turn("system", [DEFAULT_SYSTEM]) + self._turn("user", parts)
        return self._prompt(items + self._opening())

    def next_turn(self, parts: Sequence[str | Patches]) -> Prompt:
        """A user turn that goes on a conversation, and the opening of the policy's next."""
        return self._prompt(self._turn("user", parts) + self._opening())

    def closing(self) -> list[int]:
        """The tokens that end a turn, `<|im_end|>` and a newline."""
        return self._prompt([self.control["<|im_end|>"], "\n"]).tokens.tolist()

    def _opening(self) -> list[str | int | Patches]:
        return [self.control["<|im_start|>"], "assistant\n"]

    def _part(self, part, max_file_pixels: int) -> str | Patches:
        if isinstance(part, str):
            return part
        return process_image(part["image"], self.images, max_pixels=max_file_pixels)

    def _turn(self, role: str, parts: Sequence[str | Patches]) -> list[str | int | Patches]:
        start, end = self.control["<|im_start|>"], self.control["<|im_end|>"]
        return [start, f"{role}\n", *parts, end, "\n"]

    def _prompt(self, items: Iterable[str | int | Patches]) -> Prompt:
        """Joins neighbouring texts, encodes them, and expands images."""
        tokens: list[int] = []
        images: list[Patches] = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item  # tokens may span the border of two parts, as in the HF template
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


def _parse_message(message: Any) -> tuple[str, list[str | dict]]:
    """Role, and the parts of the content: texts, and images as `{"image": ..}`."""
    if not isinstance(message, dict):
        raise ConversationError("must be an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConversationError(f"unknown role {role!r}, not one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, [_checked_text(content)]
    if not isinstance(content, list):
        raise ConversationError("content must be a string or a list of parts")
    parts: list[str | dict] = []
    for number, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(_checked_text(part["text"]))
        elif kind == "image" and isinstance(part.get("image"), (str, bytes, PIL.Image.Image)):
            parts.append({"image": part["image"]})
        else:
            raise ConversationError(
                f"part {number} must be {{'type': 'text', 'text': ..}} or "
                "{'type': 'image', 'image': ..}"
            )
    return role, parts


def _checked_text(text: str) -> str:
    """`text`, unless it holds half of a surrogate pair, as JSON escapes can make."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(f"text is not valid Unicode ({error.reason})") from None
    return text
