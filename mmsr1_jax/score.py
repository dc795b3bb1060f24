"""Compute the log-probs of given conversations under a policy.

    python -m mmsr1_jax.score --model=DIR --conversations=IN.jsonl --out=OUT.jsonl \\
        [--dtype=bfloat16] [--config=FILE --config.field=value ..]

A line of IN is {"id": .., "messages": [{"role": .., "content": text | [parts]}]}, with the parts
{"type": "text", "text": ..} and {"type": "image", "image": PATH}. A path is resolved against the
current directory, then against that of IN. Any path is allowed, since the output contains no image
data, but it must be a regular file of at most 100 MB.

A line of OUT, in the order of IN, is {"id": .., "tokens": [..], "logprobs": [null, ..]}, or
{"id": .., "error": ..} for a line that cannot be scored. In that case the exit code is 1.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.policy import Policy, Rows
from mmsr1_jax.processing.batching import Bucket, TooLongError, make_rows, select_bucket
from mmsr1_jax.processing.images import ImageError
from mmsr1_jax.processing.processor import ConversationError, Processor, Prompt
from mmsr1_jax.training import train_utils
from mmsr1_jax.utils import checked_json, outputs, processes
from mmsr1_jax.utils.files import FileRefusedError, check_regular
from mmsr1_jax.utils.logs import log

_MAX_WAIT = 2048  # maximum number of lines that a conversation waits for others of its bucket

Result = dict[str, Any]  # a line of OUT


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    _START_PROCESSES(config)
    if _DTYPE.value:
        config.model.dtype = _DTYPE.value
    failed = score_file(config, _MODEL.value, pathlib.Path(_IN.value), pathlib.Path(_OUT.value))
    return 1 if failed else 0


def score_file(
    config: settings.Config, model_dir: str, source: pathlib.Path, out: pathlib.Path
) -> int:
    """Score `source` and write `out` atomically. Return the number of lines with errors."""
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out}: must be a file in an existing directory")
    lines = list(checked_json.jsonl_lines(source))
    if processes.count() > 1:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        processes.agree({"the conversations": digest, **train_utils.facts(config, model_dir)})
    processor = Processor.from_directory(model_dir)
    processor.images = processor.images.with_limits(
        config.images.min_pixels, config.images.max_pixels
    )
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = checkpoint.load(
        model_dir,
        mesh=mesh,
        param_dtype=config.model.dtype,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        logprob_chunk=config.model.logprob_chunk,
    )
    processor.check_fits(model.config)
    precision = "highest" if config.model.dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        results = score_lines(lines, model, processor, config, mesh, source.parent)
        return write_in_order(results, [line_number for line_number, _ in lines], out)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A line of IN that can be scored.

    Attributes:
      line_number: Number of the line, from 1.
      id: `id` of the line.
      prompt: Tokens and image patches.
      bucket: Shape in which it is computed.
    """

    line_number: int
    id: Any
    prompt: Prompt
    bucket: Bucket


def score_lines(
    lines: Iterable[tuple[int, bytes]],
    model: Policy,
    processor: Processor,
    config: settings.Config,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Iterator[tuple[int, Result]]:
    """Yield (line number, result) as batches fill; one batch is always in flight."""
    graph, params = nnx.split(model)

    # Replicated, so that with several processes each can read all of it.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def token_logprobs(params: nnx.State, rows: Rows) -> jax.Array:
        return nnx.merge(graph, params).token_logprobs(rows)

    def prepared() -> Iterator[Conversation | tuple[int, Result]]:
        for line_number, text in lines:
            yield prepare(line_number, text, model.config, processor, config, mesh, folder)

    in_flight = None
    for batch in batches(prepared()):
        if isinstance(batch, tuple):
            yield batch
            continue
        processes.agree({"the lines of a batch": [c.line_number for c in batch]})
        prompts = [[conversation.prompt] for conversation in batch]
        rows = make_rows(prompts, batch[0].bucket, model.config, model.config.image_token_id)
        started = batch, token_logprobs(params, sharding.shard_whole_batch(rows, mesh))
        if in_flight:
            yield from finish(*in_flight)
        in_flight = started
    if in_flight:
        yield from finish(*in_flight)


def batches(
    prepared: Iterable[Conversation | tuple[int, Result]],
) -> Iterator[list[Conversation] | tuple[int, Result]]:
    """Group conversations into batches of one bucket, and pass on error results unchanged.

    A batch is yielded when it is full, or when its first conversation has waited for `_MAX_WAIT`
    lines. That bounds the number of results that `write_in_order` holds back.
    """
    waiting: dict[Bucket, list[Conversation]] = {}
    for item in prepared:
        if isinstance(item, tuple):
            yield item
            continue
        waiting.setdefault(item.bucket, []).append(item)
        ready = [
            bucket
            for bucket, batch in waiting.items()
            if len(batch) == bucket.rows or batch[0].line_number < item.line_number - _MAX_WAIT
        ]
        for bucket in ready:
            yield waiting.pop(bucket)
    for bucket in sorted(waiting):
        yield waiting[bucket]


def prepare(
    line_number: int,
    text: bytes,
    model_config: ModelConfig,
    processor: Processor,
    config: settings.Config,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Conversation | tuple[int, Result]:
    """Convert a line to a conversation, or to (line number, error result)."""
    line_id = None
    try:
        line = parse_line(text)
        line_id = line["id"]
        messages = resolve_paths(line["messages"], folder)
        prompt = processor.conversation(messages, max_file_pixels=config.images.max_file_pixels)
        num_shards = sharding.num_batch_shards(mesh)
        bucket = select_bucket(prompt, model_config, config.buckets, num_shards)
        return Conversation(line_number, line_id, prompt, bucket)
    except (ConversationError, FileRefusedError, ImageError, TooLongError) as error:
        reason = str(error)
    except Exception as error:  # no line may end the run, whatever its content
        reason = f"{type(error).__name__}: {error}"
    return line_number, {"id": line_id, "error": f"line {line_number}: {reason}"}


def finish(
    batch: Sequence[Conversation], logprobs: jax.Array | np.ndarray
) -> Iterator[tuple[int, Result]]:
    """Wait for the log-probs of a batch, float32[B, T], and yield each line's result."""
    for row, conversation in zip(np.asarray(logprobs), batch, strict=False):
        line_number, tokens = conversation.line_number, conversation.prompt.tokens
        values = row[1 : len(tokens)]
        result: Result = {"id": conversation.id}
        if np.isfinite(values).all():
            result["tokens"] = tokens.tolist()
            result["logprobs"] = [None, *map(float, values)]
        else:
            nonfinite = int(np.argmin(np.isfinite(values))) + 1
            result["error"] = f"line {line_number}: the log-prob of token {nonfinite} is not finite"
        yield line_number, result


def parse_line(text: bytes) -> dict[str, Any]:
    """Parse one line of IN.

    Raises:
      ConversationError: The line is not a JSON object with `messages`.
    """
    try:
        line = checked_json.loads(text, surrogates=True)
    except checked_json.FormatError as error:
        raise ConversationError(str(error)) from None
    if not isinstance(line, dict) or "messages" not in line:
        raise ConversationError("must be an object with 'id' and 'messages'")
    return {"id": line.get("id"), "messages": line["messages"]}


def resolve_paths(messages: Any, folder: pathlib.Path) -> Any:
    """Resolve image paths that exist only relative to IN. Malformed messages are left unchanged.

    Raises:
      FileRefusedError: A path is not a regular file.
    """

    def resolve(part: Any) -> Any:
        path = part.get("image") if isinstance(part, dict) else None
        if isinstance(path, str):
            relative = os.path.join(folder, path)
            if not os.path.exists(path) and os.path.exists(relative):
                path, part = relative, {**part, "image": relative}
            if os.path.exists(path):
                check_regular(path)
        return part

    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [resolve(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def write_in_order(
    results: Iterable[tuple[int, Result]], line_numbers: Sequence[int], out: pathlib.Path
) -> int:
    """Write results, which arrive in any order, in the order of `line_numbers`.

    They are written to a temporary file beside `out`, which is renamed at the end; of several
    processes, process 0 does. Return the number of errors.
    """
    total = len(line_numbers)
    done: dict[int, Result] = {}
    remaining, failed, tokens, logprob = iter(line_numbers), 0, 0, 0.0
    expected = next(remaining, None)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(outputs.new_file(out)) if processes.main() else os.devnull
        file = stack.enter_context(open(path, "w", encoding="utf-8"))
        bar = tqdm(results, total=total, unit=" lines", desc="score", disable=not processes.main())
        for line_number, result in bar:
            if "error" in result:
                failed += 1
                log.warning("id %r, %s", result["id"], result["error"])
            else:
                tokens += len(result["tokens"]) - 1
                logprob += sum(result["logprobs"][1:])
            done[line_number] = result
            while expected in done:
                file.write(json.dumps(done.pop(expected)) + "\n")
                expected = next(remaining, None)
    if processes.main():
        print(
            f"scored {total - failed} of {total} conversations, {tokens} tokens, "
            f"mean log-prob {logprob / max(tokens, 1):.4f}: {out}"
        )
    if failed:
        log.warning("%d of %d lines could not be scored", failed, total)
    return failed


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _START_PROCESSES = cli.define_process_flags()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _IN = flags.DEFINE_string("conversations", None, "JSONL file to read", required=True)
    _OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
    _DTYPE = flags.DEFINE_enum(
        "dtype", None, settings.DTYPES, "overrides config.model.dtype (default: float32)"
    )
    cli.run(main)
