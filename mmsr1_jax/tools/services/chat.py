"""Client for chat completions of OpenAI-compatible servers, and the parser of their replies.

    Reply            {"choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}]}
    TEXT             a string, or a list of parts of which only text parts count
    thoughts         the model's reasoning, which is not part of the reply: text up to the last
                     `</think>`, a harmony channel other than `final`, or a separate field,
                     `reasoning_content` or `reasoning`. Text that begins with JSON or a code fence
                     has no thoughts, and only text that begins with `<|channel|>` or `<|start|>`
                     has channels
    EmptyReplyError  a server fault: not JSON, no message, an error with status 200, or an empty
                     message although the model was not cut off

Any output of the model counts as a reply, however useless: output that a prompt provokes must not
be mistaken for a server fault.
"""

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import api_key, text_field
from mmsr1_jax.tools.web import WebError, WebResponse
from mmsr1_jax.utils import checked_json

_COMPLETE = (None, "", "stop")
_NO_THOUGHTS = ("{", "```")  # prefixes of a reply without thoughts
_TRUNCATED = ("length", "max_tokens", "content_filter")


class EmptyReplyError(WebError):
    """Response without a reply of the model; a retry may succeed."""

    transient = True


@dataclasses.dataclass(frozen=True)
class Reply:
    """Reply of a model.

    Attributes:
      text: Reply without the model's thoughts; empty if the model wrote only thoughts.
      thoughts: Content of the separate reasoning field; empty if the server sends no such field.
      is_complete: Whether the reply is complete, as far as the server reports.
      prompt_tokens, completion_tokens: Tokens that the server counts; 0 if it does not say.
      raw: Content of the message before thoughts are removed. `text` is unreliable where the model
        may quote the markers that end thoughts.
    """

    text: str
    thoughts: str = ""
    is_complete: bool = True
    raw: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat:
    """Client for one model of an OpenAI-compatible server.

    Args:
      service: HTTP client for the requests.
      base_url: Base URL of the server, with or without `/v1` and a trailing slash.
      model: Name of the model on the server.
      max_tokens: Maximum number of tokens in a reply.
      key_variable: Environment variable that may contain the API key.
    """

    def __init__(
        self, service: Service, *, base_url: str, model: str, max_tokens: int, key_variable: str
    ):
        self.service, self.model = service, model
        self._url, self._max_tokens = completions_url(base_url), max_tokens
        token = api_key(key_variable, required=False)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sample: int = 0,
        ignore_breaker: bool = False,
    ) -> Reply:
        """Return the model's reply.

        Args:
          messages: Messages of the chat. The content of one may be a list of parts, for images.
          sample: Number of the sample. Sample 0 is decoded greedily; each other number is the seed
            of a reply sampled at temperature 1.
          ignore_breaker: Whether to send the request even if the circuit breaker is open, see
            `Service.call`.

        Raises:
          EmptyReplyError: The response contains no reply.
          WebError: The request failed.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": min(sample, 1),
            **({"seed": sample} if sample else {}),
            "max_tokens": self._max_tokens,
            # Disables Qwen3's default thinking mode; other models ignore this.
            "chat_template_kwargs": {"enable_thinking": False},
        }
        # Some servers label their JSON as text, so the content type is not checked.
        return await self.service.call(
            "POST", self._url, json=body, headers=self._headers, accept=(),
            parse=parse_reply, ignore_breaker=ignore_breaker,
        )  # fmt: skip


def completions_url(base_url: str) -> str:
    """Return the URL of chat completions for a server's base URL."""
    parts = urllib.parse.urlsplit(base_url)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return parts._replace(path=path).geturl()


def parse_reply(response: WebResponse) -> Reply:
    """Return the reply in a server's response. Raises EmptyReplyError, see the module docstring."""
    try:
        data = checked_json.loads(response.body)
    except checked_json.FormatError as error:
        raise EmptyReplyError(f"the response is not valid: {error}") from None
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        error = isinstance(data, dict) and data.get("error")
        raise EmptyReplyError(
            "the response reports an error" if error else "the response has no message"
        )
    content = _join_parts(message.get("content")) or text_field(message, "refusal")
    thoughts = text_field(message, "reasoning_content") or text_field(message, "reasoning")
    finish_reason = choice.get("finish_reason")
    if not content and not thoughts and finish_reason in _COMPLETE:
        raise EmptyReplyError("the message is empty")
    text, raw = _strip_thoughts(content).strip(), content.strip()
    prompt_tokens, completion_tokens = (
        _count(data, f"{kind}_tokens") for kind in ("prompt", "completion")
    )
    is_complete = finish_reason not in _TRUNCATED
    return Reply(text, thoughts.strip(), is_complete, raw, prompt_tokens, completion_tokens)


def _count(data: dict[str, Any], name: str) -> int:
    """Return a number of the response's `usage`, or 0."""
    usage = data.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**40 else 0


def _join_parts(content: Any) -> str:
    """Return the text of a message's content: a string or a list of parts."""
    if not isinstance(content, list):
        return text_field({"content": content}, "content")
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    kinds = (None, "text", "output_text")
    return "".join(text_field(part, "text") for part in parts if part.get("type") in kinds)


def _strip_thoughts(text: str) -> str:
    """Return the text after a model's thoughts; empty if the thoughts were cut off."""
    if text.lstrip().startswith(("<|channel|>", "<|start|>")):
        header, _, rest = text.rpartition("<|message|>")
        channel = header.rpartition("<|channel|>")[2].strip()
        is_final = channel.startswith("final") or "<|channel|>" not in header
        text = rest.partition("<|return|>")[0].partition("<|end|>")[0] if is_final else ""
    if text.lstrip().startswith(_NO_THOUGHTS):  # no thoughts, but it may quote their markers
        return text
    rest = text.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest
