"""Log-probs of given conversations under a policy.

    python -m mmsr1_jax.score --model=DIR --conversations=IN.jsonl --out=OUT.jsonl \\
        [--dtype=bfloat16] [--config=FILE --config.field=value ..]

IN, a line: {"id": .., "messages": [{"role": .., "content": text | [parts]}]}, parts being
{"type": "text", "text": ..} and {"type": "image", "image": PATH}; a path is looked up from the
current directory, then from IN's.
OUT, a line, in the order of IN: {"id": .., "tokens": [..], "logprobs": [null, ..]}, or
{"id": .., "error": ..} for a line that cannot be scored; then the exit code is 1.
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

from mmsr1_jax import config as settings
from mmsr1_jax import sharding
from mmsr1_jax.batching import Bucket, TooLongError, bucket_of, make_rows
from mmsr1_jax.images import ImageError
from mmsr1_jax.models import qwen2_5_vl
from mmsr1_jax.models.qwen2_5_vl import Rows
from mmsr1_jax.processor import ConversationError, Processor, Prompt

_CONFIG = settings.define_flag()
_MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
_IN = flags.DEFINE_string("conversations", None, "JSONL to read", required=True)
_OUT = flags.DEFINE_string("out", None, "JSONL to write", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, settings.DTYPES, "overrides config.model.dtype (default: float32)"
)


def main(argv) -> int:
    del argv
    config = _CONFIG.value
    if _DTYPE.value:
        config.model.dtype = _DTYPE.value
    try:
        failed = score_file(config, _MODEL.value, pathlib.Path(_IN.value), pathlib.Path(_OUT.value))
    except (ValueError, OSError) as error:  # checkpoint, tokenizer, mesh or file: said in one line
        sys.exit(f"error: {error}")
    return 1 if failed else 0


def score_file(
    config: settings.Config, model_dir: str, source: pathlib.Path, out: pathlib.Path
) -> int:
    """Scores `source` into `out`, which appears when it is complete. Returns the bad lines."""
    lines = [
        line for line in enumerate(source.read_text("utf-8").splitlines(), 1) if line[1].strip()
    ]
    processor = Processor.from_directory(model_dir)
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
    model_config = model.config
    graph, params = nnx.split(model)

    @jax.jit
    def token_logprobs(params, rows: Rows) -> jax.Array:
        return nnx.merge(graph, params).token_logprobs(rows)

    def score(bucket: Bucket, batch: list[tuple[int, dict, Prompt]]):
        """Starts a batch; yields each line's result when asked for it."""
        prompts = [[prompt] for _, _, prompt in batch]
        image_token = processor.control["<|image_pad|>"]
        rows = make_rows(prompts, bucket, model_config, image_token)
        with jax.set_mesh(mesh):
            logprobs = token_logprobs(params, sharding.shard_batch(rows, mesh))
        return batch, logprobs

    def finish(started):
        batch, logprobs = started
        for row, (number, line, prompt) in zip(np.asarray(logprobs), batch, strict=False):
            values = [None, *map(float, row[1 : len(prompt.tokens)])]
            yield number, {"id": line["id"], "tokens": prompt.tokens.tolist(), "logprobs": values}

    def results() -> Iterator[tuple[int, dict]]:
        """(line number, what to write), as batches fill; one batch is always in flight."""
        waiting: dict[Bucket, list] = {}
        in_flight = None
        ways = sharding.batch_ways(mesh)
        for number, text in lines:
            line_id = None
            try:
                line = parse_line(text)
                line_id = line["id"]
                messages = resolve_paths(line["messages"], source.parent)
                prompt = processor.conversation(
                    messages, max_file_pixels=config.images.max_file_pixels
                )
                bucket = bucket_of(prompt, model_config, config.buckets, ways)
            except (ConversationError, ImageError, TooLongError) as error:
                yield number, {"id": line_id, "error": f"line {number}: {error}"}
                continue
            waiting.setdefault(bucket, []).append((number, line, prompt))
            if len(waiting[bucket]) == bucket.rows:
                started = score(bucket, waiting.pop(bucket))
                if in_flight:
                    yield from finish(in_flight)
                in_flight = started
        for bucket in sorted(waiting):
            started = score(bucket, waiting[bucket])
            if in_flight:
                yield from finish(in_flight)
            in_flight = started
        if in_flight:
            yield from finish(in_flight)

    return write_in_order(results(), [number for number, _ in lines], out)


def parse_line(text: str) -> dict:
    """One line of IN. Raises ConversationError where it is not an object with id and messages."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ConversationError(f"not JSON ({error})") from None
    if not isinstance(line, dict) or "messages" not in line:
        raise ConversationError("must be an object with 'id' and 'messages'")
    return {"id": line.get("id"), "messages": line["messages"]}


def resolve_paths(messages, folder: pathlib.Path):
    """Messages with image paths that exist only beside IN made so; anything odd is left alone."""

    def resolve(part):
        path = part.get("image") if isinstance(part, dict) else None
        if isinstance(path, str) and not os.path.exists(path) and (folder / path).exists():
            return {**part, "image": str(folder / path)}
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
    """Writes results, which come in any order, in the order given. Returns the number of errors.

    Written beside `out` and moved there at the end.
    """
    partial = out.with_name(f".{out.name}.partial")
    done: dict[int, dict] = {}
    remaining, failed, logprobs = iter(order), 0, []
    expected = next(remaining, None)
    with open(partial, "w", encoding="utf-8") as file:
        for number, result in tqdm(results, total=len(order), unit=" conversations", desc="score"):
            if "error" in result:
                failed += 1
                tqdm.write(f"id {result['id']!r}, {result['error']}", file=sys.stderr)
            logprobs += result.get("logprobs", [])[1:]
            done[number] = result
            while expected in done:
                file.write(json.dumps(done.pop(expected), ensure_ascii=False) + "\n")
                expected = next(remaining, None)
    os.replace(partial, out)
    print(
        f"scored {len(order) - failed} of {len(order)} conversations, {len(logprobs)} tokens, "
        f"mean log-prob {np.mean(logprobs or [np.nan]):.4f}: {out}"
    )
    if failed:
        print(f"{failed} of {len(order)} lines could not be scored", file=sys.stderr)
    return failed


if __name__ == "__main__":
    settings.run(main)
