"""Models behind OpenAI-compatible servers: prompts with fences, cached replies, votes.

Text from outside stands between fences that contain a hash of it, as for the judge, so no text can
contain its own fence. A reply is a JSON object of a declared type; any other reply is unreadable,
and counts as no vote.
"""

import base64
import hashlib
import json
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from mmsr1_jax.data.construction.meter import Meter
from mmsr1_jax.tools.cached_tool import CachedCalls, NotCachedError
from mmsr1_jax.tools.service import ServiceRefusedError, is_refusal, is_temporary
from mmsr1_jax.tools.services.chat import Chat, EmptyReplyError
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.checked_json import utf8, valid_text

PROMPTS = pathlib.Path(__file__).parent / "prompts"
_MAX_REPLY_CHARS = 50_000
_TEST = [{"role": "user", "content": "Reply with the word OK."}]

T = TypeVar("T")


class Model:
    """A model with a role, `writer` or `checker`.

    Args:
      name: Role, which is also the name of its service.
      chat: Client of the model.
      cached_calls: Cache of replies.
      meter: Meter of tokens.
    """

    def __init__(self, name: str, chat: Chat, cached_calls: CachedCalls, meter: Meter):
        self.name, self._chat, self._cached_calls, self._meter = name, chat, cached_calls, meter
        self._is_tested = False

    async def ask(
        self,
        prompt: str,
        type: type[T],
        texts: Mapping[str, str],
        *,
        image: bytes | None = None,
        sample: int = 0,
        **fields: Any,
    ) -> T | None:
        """Return a reply, or None if the model's reply is unreadable or this request is refused.

        Args:
          prompt: Name of a file in `prompts/`.
          type: Type of the JSON object of the reply, see `checked_json.loads`.
          texts: Texts from outside, by the name under which the prompt speaks of them.
          image: JPEG file that the model sees.
          sample: Number of the sample, see `Chat`.
          **fields: Further fields of the prompt.

        Raises:
          WebError: The server is down or overloaded.
          ServiceRefusedError: The server refuses all requests.
        """
        turns = messages(prompt, texts, image, **fields)

        async def call() -> str:
            try:
                reply = await self._chat(turns, sample=sample)
            except EmptyReplyError:
                return ""  # after all attempts; unreadable like any other reply without an object
            self._meter.add_tokens(self.name, reply.prompt_tokens, reply.completion_tokens)
            return valid_text(reply.text or reply.thoughts)

        digest = hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).hexdigest()
        key = json.dumps([self._chat.model, digest, sample])
        try:
            return parse(await self._cached_calls.get("chat", key, call), type)
        except WebError as error:
            if is_temporary(error) or isinstance(error, NotCachedError):
                raise
            if is_refusal(error) and not self._is_tested:
                await self._test()
            return None

    async def _test(self) -> None:
        """Raise ServiceRefusedError if the server refuses a harmless request too."""
        try:
            await self._chat(_TEST)
        except WebError as error:
            if is_refusal(error):
                message = self._chat.service.refusal_message(error)
                raise ServiceRefusedError(message) from None
        self._is_tested = True


def messages(
    prompt: str, texts: Mapping[str, str], image: bytes | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """Return the chat messages of a request; see `Model.ask`."""
    texts = {name: valid_text(text) for name, text in texts.items()}
    fence = "=" * 8 + hashlib.blake2b(utf8(json.dumps(texts)), digest_size=8).hexdigest()
    system = (PROMPTS / f"{prompt}.txt").read_text(encoding="utf-8").strip()
    user = "\n\n".join(f"{name}:\n{fence}\n{text}\n{fence}" for name, text in texts.items())
    content: Any = user
    if image is not None:
        address = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": user},
        ]
    return [
        {"role": "system", "content": system.format(fence=fence, **fields)},
        {"role": "user", "content": content},
    ]


def parse(text: str, type: type[T]) -> T | None:
    """Return the JSON object in a reply, or None if it has none of the type.

    The object may be surrounded by other text without braces, such as a code fence.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start or len(text) > _MAX_REPLY_CHARS:
        return None
    try:
        return checked_json.loads(text[start : end + 1], type)
    except checked_json.FormatError:
        return None


async def votes(
    ask: Callable[[int], Awaitable[bool | None]], count: int, agreement: int
) -> tuple[bool, list[bool | None]]:
    """Ask for up to `count` votes, and stop when `agreement` agree or no longer can.

    Args:
      ask: Function from the number of a sample to a vote; None is no vote.
      count: Maximum number of votes.
      agreement: Number of positive votes that are needed.

    Returns:
      Whether enough votes are positive, and the votes.
    """
    cast: list[bool | None] = []
    while cast.count(True) < agreement <= cast.count(True) + count - len(cast):
        cast.append(await ask(len(cast)))
    return cast.count(True) >= agreement, cast
