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

import json
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from mmsr1_jax import cli
from mmsr1_jax.config import settings
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl import Rows
from mmsr1_jax.processing.batching import Bucket, TooLongError, make_rows, select_bucket
from mmsr1_jax.processing.images import ImageError
from mmsr1_jax.processing.processor import ConversationError, Processor, Prompt
from mmsr1_jax.utils import checked_json, outputs
from mmsr1_jax.utils.files import FileRefusedError, check_regular

_MAX_WAIT = 2048  # maximum number of lines that a conversation waits for others of its bucket


def main(argv) -> int:
    del argv
    config = _CONFIG.value
    if _DTYPE.value:
        config.model.dtype = _DTYPE.value
    try:
        failed = score_file(config, _MODEL.value, pathlib.Path(_IN.value), pathlib.Path(_OUT.value))
    except (ValueError, OSError) as error:  # invalid checkpoint, tokenizer, mesh or file
        sys.exit(f"error: {error}")
    return 1 if failed else 0


def score_file(
    config: settings.Config, model_dir: str, source: pathlib.Path, out: pathlib.Path
) -> int:
    """Score `source` and write `out` atomically. Return the number of lines with errors."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out={out}: must be a file in a directory that exists")
    lines = list(read_lines(source))
    processor = Processor.from_directory(model_dir)
    processor.images = processor.images.with_limits(
        config.images.min_pixels, config.images.max_pixels
    )
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = qwen2_5_vl.load(
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
        return write_in_order(results, [number for number, _ in lines], out)


def score_lines(
    lines: list[tuple[int, bytes]],
    model: qwen2_5_vl.Qwen2_5_VL,
    processor: Processor,
    config: settings.Config,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Iterator[tuple[int, dict]]:
    """Yield (line number, result) as batches fill; one batch is always in flight."""
    graph, params = nnx.split(model)

    @jax.jit
    def token_logprobs(params, rows: Rows) -> jax.Array:
        return nnx.merge(graph, params).token_logprobs(rows)

    waiting: dict[Bucket, list[tuple[int, dict, Prompt]]] = {}

    def ready(number: int) -> list[Bucket]:
        """Return the buckets that are full, or whose first line has waited too long.

        The limit bounds the results that `write_in_order` holds back.
        """
        return [
            bucket
            for bucket, items in waiting.items()
            if len(items) == bucket.rows or items[0][0] < number - _MAX_WAIT
        ]

    def batches() -> Iterator[tuple[Bucket | None, list]]:
        """Yield batches as they are ready, and (None, error) for lines that cannot be scored."""
        for number, text in lines:
            prepared = prepare(number, text, model.config, processor, config, mesh, folder)
            if isinstance(prepared, dict):
                yield None, [(number, prepared)]
                continue
            line, prompt, bucket = prepared
            waiting.setdefault(bucket, []).append((number, line, prompt))
            for bucket in ready(number):
                yield bucket, waiting.pop(bucket)
        for bucket in sorted(waiting):
            yield bucket, waiting[bucket]

    in_flight = None
    for bucket, batch in batches():
        if bucket is None:
            yield from batch
            continue
        prompts = [[prompt] for _, _, prompt in batch]
        rows = make_rows(prompts, bucket, model.config, model.config.image_token_id)
        started = batch, token_logprobs(params, sharding.shard_batch(rows, mesh))
        if in_flight:
            yield from finish(*in_flight)
        in_flight = started
    if in_flight:
        yield from finish(*in_flight)


def prepare(
    number: int,
    text: bytes,
    model_config: qwen2_5_vl.ModelConfig,
    processor: Processor,
    config: settings.Config,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> tuple[dict, Prompt, Bucket] | dict:
    """Convert a line to (line, prompt, bucket), or to an error result if it cannot be scored."""
    line_id = None
    try:
        line = parse_line(text)
        line_id = line["id"]
        messages = resolve_paths(line["messages"], folder)
        prompt = processor.conversation(messages, max_file_pixels=config.images.max_file_pixels)
        ways = sharding.num_batch_shards(mesh)
        return line, prompt, select_bucket(prompt, model_config, config.buckets, ways)
    except (ConversationError, FileRefusedError, ImageError, TooLongError) as error:
        reason = str(error)
    except Exception as error:  # no line may end the run, whatever its content
        reason = f"{type(error).__name__}: {error}"
    return {"id": line_id, "error": f"line {number}: {reason}"}


def finish(
    batch: list[tuple[int, dict, Prompt]], logprobs: jax.Array
) -> Iterator[tuple[int, dict]]:
    """Wait for the log-probs of a batch, float32[B, T], and yield each line's result."""
    for row, (number, line, prompt) in zip(np.asarray(logprobs), batch, strict=False):
        values = row[1 : len(prompt.tokens)]
        result = {"id": line["id"]}
        if np.isfinite(values).all():
            result["tokens"] = prompt.tokens.tolist()
            result["logprobs"] = [None, *map(float, values)]
        else:
            bad = int(np.argmin(np.isfinite(values))) + 1
            result["error"] = f"line {number}: the log-prob of token {bad} is not finite"
        yield number, result


def read_lines(source: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of non-blank lines; only a newline ends a line."""
    return checked_json.jsonl_lines(source)


def parse_line(text: bytes) -> dict:
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


def resolve_paths(messages, folder: pathlib.Path):
    """Resolve image paths that exist only relative to IN. Malformed messages are left unchanged.

    Raises:
      FileRefusedError: A path is not a regular file.
    """

    def resolve(part):
        path = part.get("image") if isinstance(part, dict) else None
        if isinstance(path, str):
            beside = os.path.join(folder, path)
            if not os.path.exists(path) and os.path.exists(beside):
                path, part = beside, {**part, "image": beside}
            if os.path.exists(path):
                check_regular(path)
        return part

    if not isinstance(messages, list):
        return messages
    return [
        {**m, "content": [resolve(p) for p in m["content"]]}
        if isinstance(m, dict) and isinstance(m.get("content"), list)
        else m
        for m in messages
    ]


def write_in_order(results: Iterator[tuple[int, dict]], order: list[int], out: pathlib.Path) -> int:
    """Write results, which arrive in any order, in the given order.

    They are written to a temporary file beside `out`, which is renamed at the end. Return the
    number of errors.
    """
    done: dict[int, dict] = {}
    remaining, failed, tokens, total = iter(order), 0, 0, 0.0
    expected = next(remaining, None)
    with outputs.new_text_file(out) as file:
        for number, result in tqdm(results, total=len(order), unit=" lines", desc="score"):
            if "error" in result:
                failed += 1
                tqdm.write(f"id {result['id']!r}, {result['error']}", file=sys.stderr)
            else:
                tokens += len(result["tokens"]) - 1
                total += sum(result["logprobs"][1:])
            done[number] = result
            while expected in done:
                file.write(json.dumps(done.pop(expected)) + "\n")
                expected = next(remaining, None)
    print(
        f"scored {len(order) - failed} of {len(order)} conversations, {tokens} tokens, "
        f"mean log-prob {total / max(tokens, 1):.4f}: {out}"
    )
    if failed:
        print(f"{failed} of {len(order)} lines could not be scored", file=sys.stderr)
    return failed


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _IN = flags.DEFINE_string("conversations", None, "JSONL to read", required=True)
    _OUT = flags.DEFINE_string("out", None, "JSONL to write", required=True)
    _DTYPE = flags.DEFINE_enum(
        "dtype", None, settings.DTYPES, "overrides config.model.dtype (default: float32)"
    )
    cli.run(main)
