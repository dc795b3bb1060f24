"""Client for chat completions of OpenAI-compatible servers, and the parser of their replies.

    Reply            {"choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}]}
    TEXT             a string, or a list of parts of which only text parts count
    thoughts         the model's reasoning, which is not part of the reply: text up to the last
                     `</think>`, a harmony channel other than `final`, or a separate field,
                     `reasoning_content` or `reasoning`. Text that begins with JSON or a code fence
                     has no thoughts, and only text that begins with `<|channel|>` or `<|start|>`
                     has channels
    EmptyReplyError  a server fault: not JSON, no message, an error with status 200, or an empty
                     message although the model ended by itself

Any output of the model counts as a reply, however useless: output that a prompt provokes must not
be mistaken for a server fault.
"""

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import key_of, text_of
from mmsr1_jax.tools.web import Answer, WebError
from mmsr1_jax.utils import checked_json

_ENDED = (None, "", "stop")
_OPENINGS = ("{", "```")  # prefixes of a reply without thoughts
_CUT_OFF = ("length", "max_tokens", "content_filter")


class EmptyReplyError(WebError):
    """A server answer without a reply of the model; a retry may succeed."""

    transient = True


@dataclasses.dataclass(frozen=True)
class Reply:
    """Reply of a model.

    Attributes:
      text: Reply without the model's thoughts; empty if the model wrote only thoughts.
      thoughts: Content of the separate reasoning field; empty if the server sends no such field.
      whole: Whether the model ended the reply by itself, as far as the server reports.
      raw: Content of the message before thoughts are removed. `text` is unreliable where the model
        may quote the markers that end thoughts.
    """

    text: str
    thoughts: str = ""
    whole: bool = True
    raw: str = ""


class Chat:
    """Client for one model of an OpenAI-compatible server.

    Args:
      service: HTTP client for the requests.
      base_url: Base URL of the server, with or without `/v1` and a trailing slash.
      model: Name of the model on the server.
      max_tokens: Maximum number of tokens in a reply.
      key: Environment variable that may contain the API key.
    """

    def __init__(self, service: Service, *, base_url: str, model: str, max_tokens: int, key: str):
        self.service, self.model = service, model
        self._url, self._max_tokens = completions_url(base_url), max_tokens
        token = key_of(key, needed=False)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def __call__(
        self, messages: Sequence[Mapping[str, str]], *, even_if_down: bool = False
    ) -> Reply:
        """Return the model's reply.

        Args:
          messages: Messages of the chat.
          even_if_down: Whether to send the request even if the circuit breaker is open, see
            `Service.call`.

        Raises:
          EmptyReplyError: The answer contains no reply.
          WebError: The request failed.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._max_tokens,
            # Disables Qwen3's default thinking mode; other models ignore this.
            "chat_template_kwargs": {"enable_thinking": False},
        }
        # Some servers label their JSON as text, so the content type is not checked.
        return await self.service.call(
            "POST", self._url, json=body, headers=self._headers, accept=(),
            read=read_reply, even_if_down=even_if_down,
        )  # fmt: skip


def completions_url(base_url: str) -> str:
    """Return the URL of chat completions for a server's base URL."""
    parts = urllib.parse.urlsplit(base_url)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return parts._replace(path=path).geturl()


def read_reply(answer: Answer) -> Reply:
    """Return the reply in a server's answer. Raises EmptyReplyError, see the module docstring."""
    try:
        data = checked_json.loads(answer.body)
    except checked_json.FormatError as error:
        raise EmptyReplyError(f"the reply cannot be read: {error}") from None
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        failed = isinstance(data, dict) and data.get("error")
        raise EmptyReplyError(
            "an error in place of a reply" if failed else "an answer without a message"
        )
    content = _joined(message.get("content")) or text_of(message, "refusal")
    thoughts = text_of(message, "reasoning_content") or text_of(message, "reasoning")
    finish = choice.get("finish_reason")
    if not content and not thoughts and finish in _ENDED:
        raise EmptyReplyError("an empty message")
    text, raw = _without_thoughts(content).strip(), content.strip()
    return Reply(text, thoughts.strip(), finish not in _CUT_OFF, raw)


def _joined(content: Any) -> str:
    """Return the text of a message's content: a string or a list of parts."""
    if not isinstance(content, list):
        return text_of({"content": content}, "content")
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    kinds = (None, "text", "output_text")
    return "".join(text_of(part, "text") for part in parts if part.get("type") in kinds)


def _without_thoughts(text: str) -> str:
    """Return the text after a model's thoughts; empty if the thoughts were cut off."""
    if text.lstrip().startswith(("<|channel|>", "<|start|>")):
        head, _, rest = text.rpartition("<|message|>")
        channel = head.rpartition("<|channel|>")[2].strip()
        final = channel.startswith("final") or "<|channel|>" not in head
        text = rest.partition("<|return|>")[0].partition("<|end|>")[0] if final else ""
    if text.lstrip().startswith(_OPENINGS):  # no thoughts, but it may quote their markers
        return text
    rest = text.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest
