"""What only an accelerator can show, measured by one command in at most eight minutes.

    python -m tests.device [--out=build/device.json] [--parts NAME ..] [--tiny]

| part | |
|---|---|
| `device` | names and versions; speed of copies and of matrix products |
| `parity` | every kernel of the platform: attention with gradients, paged, gated product, sampler |
| `gap` | log-probs that the engine records, against those of the trainer for the same tokens |
| `decoding` | tokens/s at 7B shape, and the share of the bandwidth |
| `speed` | attention and its gradient, attention over pages, the gated product: FLOP/s, bytes/s |
| `update` | MFU of forward+backward and of updates, four layers of 7B and 3B width |
| `demo` | ten steps of the embedded task |

Each part runs in a process of its own (`tests.device_parts`), so it gets the whole device, leaves
nothing behind, and may fail in any way: the result has the error, and the other parts follow.
A part has a share of the time; what it does not use is left to the parts after it. What one has
compiled, others find in a common cache. A part that
exceeds its time is stopped, and the result says so. The file is rewritten after each part. On a
CPU all sizes are tiny.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Seconds of each part, and at most of one measurement, after which the part continues with the next
# one. In this order.
LIMITS = {
    "device": (20, 20),
    "parity": (110, 40),
    "gap": (55, 50),
    "decoding": (45, 40),
    "speed": (60, 30),
    "update": (95, 60),
    "demo": (95, 300),
}
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # 256 lanes of 2k tokens at 7B shape take 47 GB
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def run_part(command: Sequence[str], seconds: float, measurement_seconds: float) -> dict[str, Any]:
    """Run a part to its end, and return its results.

    If its process dies, or one measurement takes too long, a new process continues with the next
    measurement.

    Args:
      command: Command that measures; `--out=FILE --start=N` are added.
      seconds: Time of the part. It is stopped after that.
      measurement_seconds: Time of one measurement.

    Returns:
      `seconds`, `results` as `tests.device_parts` writes them, and `error`, which is null unless
      measurements are missing.
    """
    begin = time.monotonic()
    results: list[dict[str, Any]] = []
    error = None
    with tempfile.TemporaryDirectory() as directory:
        while error is None:
            file = pathlib.Path(directory, f"{len(results)}.json")
            arguments = [*command, f"--out={file}", f"--start={len(results)}"]
            reason = _run(arguments, file, begin + seconds, measurement_seconds)
            state = json.loads(file.read_text()) if file.is_file() else None
            if state is None:
                error = reason or "no results"
                break
            results += state["results"]
            if state["running"]:
                results.append({"name": state["running"], "error": reason or "no result"})
            missing = state["total"] - len(results)
            if time.monotonic() >= begin + seconds and (missing or state["running"]):
                error = f"stopped after {seconds:.0f} s; {missing} more measurements are missing"
            elif not missing:
                break
            elif not state["results"] and not state["running"]:
                error = reason or "no results"  # a new process would fail likewise
    return {"seconds": round(time.monotonic() - begin, 1), "error": error, "results": results}


def _run(
    command: Sequence[str], file: pathlib.Path, deadline: float, measurement_seconds: float
) -> str | None:
    """Run a process until it ends or takes too long. Return the reason if it did not succeed."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT | os.environ, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        reason, progress, last_change = None, None, time.monotonic()
        try:
            while process.poll() is None and reason is None:
                time.sleep(0.05)
                now, changed = time.monotonic(), _modified(file)
                if changed != progress:
                    progress, last_change = changed, now
                if now >= deadline:
                    reason = "stopped: the time of the part was over"
                elif now - last_change > measurement_seconds:
                    reason = f"stopped after {measurement_seconds:.0f} s"
        finally:
            _kill_group(process)
        if reason is None and process.returncode:
            log.seek(0)
            reason = f"exit code {process.returncode}: {log.read()[-2000:].strip()}"
        return reason


def _modified(file: pathlib.Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table."""
    lines = ["| part | measurement | s | result |", "|---|---|---|---|"]
    for name, part in result["parts"].items():
        for row in part["results"]:
            values = {k: v for k, v in row.items() if k not in ("name", "seconds")}
            text = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
            lines.append(f"| {name} | {row['name']} | {row.get('seconds', '')} | {text} |")
        end = f"**{_short(part['error'])}**" if part["error"] else "complete"
        lines.append(f"| {name} | | {part['seconds']} | {end} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "/").split())[:200]


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result as JSON; a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/device.json"))
    parser.add_argument("--parts", nargs="*", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on a CPU")
    options = parser.parse_args()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="compiled")  # removed when the process ends
        ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"] = cache.name
    begin = deadline = time.monotonic()
    result: dict[str, Any] = {"device": None, "seconds": 0.0, "parts": {}}
    tiny = options.tiny
    for name in dict.fromkeys(["device", *options.parts]):
        seconds, measurement_seconds = LIMITS[name]
        deadline += seconds
        command = [sys.executable, "-m", "tests.device_parts", name, *["--tiny"] * tiny]
        part = run_part(command, deadline - time.monotonic(), measurement_seconds)
        result["parts"][name] = part
        for row in part["results"]:
            if row["name"] == "facts" and "kind" in row:
                result["device"] = {k: v for k, v in row.items() if k not in ("name", "seconds")}
                tiny = tiny or row["platform"] == "cpu"
        result["seconds"] = round(time.monotonic() - begin, 1)
        write(options.out, result)
        print(f"{name}: {part['seconds']} s, {part['error'] or 'complete'}", flush=True)
    print(table(result))
    print(f"{options.out}: {result['seconds']} s in all")
    failed = any(p["error"] or any("error" in r or r.get("passed") is False for r in p["results"])
                 for p in result["parts"].values())  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
