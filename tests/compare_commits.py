"""Compare the outputs of this checkout with those of the commit before the redesign, bit by bit.

    git worktree add ../before a168046
    python -m tests.compare_commits ../before

Both checkouts run in this Python environment: a seeded run of five steps of `configs/tiny.py`, an
evaluation of the policy that it wrote, and `infer --json` on a held-out question. Compared are all
metrics but times, every saved episode (tokens, log-probs, rewards), the bytes of the trained
policy, the results of the evaluation, and the episode of `infer`. Names of fields are mapped.
The exit code is 1 if anything differs.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 5
QUESTION = "When was it opened?"
# Names at the earlier commit -> names here.
TINY_WORLD = (
    ("mmsr1_jax.tiny_world", "--stories=0"),
    ("mmsr1_jax.scripts.tiny_world", "--sft_examples=0"),
)
METRICS = {
    "groups/asked": "groups/sampled",
    "groups/spread": "groups/with_variance",
    "update/rate": "update/learning_rate",
    "update/lost": "update/nonfinite",
    "update/left_out": "update/skipped",
    "update/packing": "update/packing_efficiency",
    "update/correction": "update/tis_weight",
    "update/corrections_capped": "update/tis_capped",
    "update/engine_gap_abs": "update/rollout_logprob_diff_abs",
    "update/engine_gap_rms": "update/rollout_logprob_diff_rms",
    "time/compiled": "time/compiles",
}
PREFIXES = {"accuracy_of/": "accuracy_by_category/", "search_of/": "search_by_category/"}
FIELDS = {
    "number": "index", "found": "num_results", "shown": "num_shown", "pictures": "image_spans",
    "share": "episode_fraction", "an_episode": "per_episode",
    "made_of_allowed": "fraction_of_allowed", "match": "criterion", "right": "correct",
    "left_out": "skipped",
}  # fmt: skip
IGNORED = ("seconds", "made_with", "provenance", "images")  # times, settings, paths


def main() -> int:
    before = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        outputs = []
        for index, tree in enumerate((before, ROOT)):
            out = pathlib.Path(folder, "before" if index == 0 else "after")
            run_all(tree, out, index)
            outputs.append(out)
        differences = compare(*outputs)
    for difference in differences:
        print(difference)
    print(f"{len(differences)} differences")
    return 1 if differences else 0


def run_all(tree: pathlib.Path, out: pathlib.Path, index: int) -> None:
    """Run the commands of a checkout; `index` selects the names of its commands."""

    def run(module: str, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=tree, check=True, text=True,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    world = out / "world"
    out.mkdir(parents=True)
    run(*TINY_WORLD[index], f"--out={world}")
    config = ["--config=configs/tiny.py", f"--config.tools.index={world / 'index'}"]
    run(
        "mmsr1_jax.train", *config, f"--workdir={out / 'run'}", f"--config.run.steps={STEPS}",
        f"--config.data.train=('{world / 'train.parquet'}',)",
    )  # fmt: skip
    run(
        "mmsr1_jax.evaluate", *config, f"--model={out / 'run' / 'policy'}", f"--out={out / 'eval'}",
        f"--config.eval.data=('{world / 'heldout.parquet'}',)",
        "--config.eval.workflows=('on_demand', 'rag')",
    )  # fmt: skip
    image = ROOT / "docs" / "demo" / "bridge.jpg"
    text = run(
        "mmsr1_jax.infer", *config, f"--model={out / 'run' / 'policy'}", "--json",
        f"--image={image}", f"--question={QUESTION}",
    )  # fmt: skip
    (out / "infer.json").write_text(text)


def compare(before: pathlib.Path, after: pathlib.Path) -> list[str]:
    """Return a line for each difference between the outputs of `run_all`."""
    old, new = (lines_of(out / "run" / "metrics.jsonl") for out in (before, after))
    found = differences([renamed(line) for line in old], new, "metrics")
    for step in range(1, STEPS + 1):
        name = pathlib.Path("run", "episodes", f"{step:06d}.jsonl")
        found += differences(lines_of(before / name), lines_of(after / name), str(name))
    policies = [out / "run" / "policy" / "model.safetensors" for out in (before, after)]
    if policies[0].read_bytes() != policies[1].read_bytes():
        found.append("policy: the files differ")
    episodes = [
        sorted(lines_of(out / "eval" / "episodes.jsonl"), key=lambda e: (e["workflow"], e["group"]))
        for out in (before, after)
    ]
    found += differences(*episodes, "evaluation episodes")
    results = [json.loads((out / "eval" / "results.json").read_text()) for out in (before, after)]
    found += differences(*results, "results.json")
    infer = [json.loads((out / "infer.json").read_text()) for out in (before, after)]
    return found + differences(*infer, "infer --json")


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def renamed(line: dict[str, float]) -> dict[str, float]:
    """Return a line of `metrics.jsonl` with the names of this checkout, without times."""
    values = {}
    for name, value in line.items():
        for old, new in PREFIXES.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        values[METRICS.get(name, name)] = value
    return values


def differences(old: Any, new: Any, where: str) -> list[str]:
    """Return a line for each value that differs, fields of the earlier commit mapped."""
    if isinstance(old, dict) and isinstance(new, dict):
        old = {n if n in new else FIELDS.get(n, n): value for n, value in old.items()}
        lines = []
        for name in sorted(old.keys() | new.keys()):
            if name in IGNORED or name.startswith("time/") or name == "tool/seconds":
                continue
            if name not in old or name not in new:
                lines.append(f"{where}: {name!r} only {'before' if name in old else 'after'}")
            else:
                lines += differences(old[name], new[name], f"{where}.{name}")
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {str(old)[:80]} before, {str(new)[:80]} after"]


if __name__ == "__main__":
    sys.exit(main())
