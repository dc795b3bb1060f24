"""Write the tables of plans into a page, between its two marker comments.

    python docs/plan_tables.py build/plan docs/performance.md

The directory holds the output of `mmsr1 plan --json` as `CONFIG.TARGET.json` (`make plan`).
"""

import json
import pathlib
import sys

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
_GIB = 2.0**30
_PROGRAMS = (
    "program", "arguments", "temporaries", "moved", "needed", "TFLOP", "needed", "bound",
    "estimate", "compiling",
)  # fmt: skip


def tables(plans: dict[str, dict]) -> str:
    """Return a table of programs for each plan, and one of the memory of all plans' phases.

    Args:
      plans: Output of `mmsr1 plan --json` by the name of the config and the target.
    """
    blocks = []
    for name, plan in plans.items():
        rows = [_row(_PROGRAMS), _row(["---"] * len(_PROGRAMS))]
        blocks += [f"{name}:", "\n".join(rows + [_program(p) for p in plan["programs"]])]
    first = next(iter(plans.values()))
    names = [phase["name"] for phase in first["phases"]]
    columns = ["GiB of", *names, "largest KV cache", "full lanes"]
    rows = [_row(columns), _row(["---"] * len(columns))]
    for name, plan in plans.items():
        limit = plan["phases"][0]["limit"] / _GIB
        cache = plan["cache"]
        largest = f"`{cache['setting']}={cache['largest']}`" if cache["largest"] else "none fits"
        lanes = str(cache["most_lanes"])
        if cache["largest"] is None:  # programs are missing
            largest, lanes = "", ""
        phases = [_phase(phase) for phase in plan["phases"]]
        rows.append(_row([f"{name}: {limit:.1f}", *phases, largest, lanes]))
    return "\n\n".join([*blocks, "Memory of each phase of a step:", "\n".join(rows)])


def replace(page: str, text: str) -> str:
    """Return a page with a text between its markers.

    Raises:
      ValueError: The page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _program(program: dict) -> str:
    if program["problem"]:
        size = f"over {_size(program['temporary_bytes'])}"
        return _row([program["name"], "", size, *[""] * (len(_PROGRAMS) - 4), "refused"])
    sizes = [_size(program[f"{n}_bytes"]) for n in ("argument", "temporary", "moved", "needed")]
    flops = [f"{program[name] / 1e12:.1f}" for name in ("counted_flops", "flops")]
    times = [_time(program[name]) for name in ("bound_seconds", "seconds")]
    cpu = f"{program['compile_cpu_seconds']:.0f} s"
    return _row([program["name"], *sizes, *flops, *times, cpu])


def _phase(phase: dict) -> str:
    size = f"{phase['bytes'] / _GIB:.1f}"
    if phase["fits"] is None:
        return "not compiled"
    return f"{size} fits" if phase["fits"] else f"**{size}**: {phase['advice']}"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _size(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def main(directory: str, page: str) -> None:
    files = sorted(pathlib.Path(directory).glob("*.json"))
    if not files:
        sys.exit(f"error: {directory} contains no plans; run `make plan`")
    plans = {}
    for file in files:
        config, _, target = file.stem.partition(".")
        plans[f"`{config}` on {target}"] = json.loads(file.read_text(encoding="utf-8"))
    path = pathlib.Path(page)
    path.write_text(replace(path.read_text(encoding="utf-8"), tables(plans)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
