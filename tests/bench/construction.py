"""Train on constructed questions and on the demo's own, and compare the policies.

    python -m tests.bench.construction [--out=build/construction] [--seeds=3] [--rate=0.1]

Constructs 500 questions of the tiny world with models that are wrong in a share of their replies
(`tests/construction_server.py`), trains the demo's policy on them and on the demo's own questions
with each seed, and evaluates all policies as `make demo` does. Prints the table of the demo for
both, and the difference of their accuracies on demand, which should be at most 5 points. Existing
evaluations in the output directory are kept, so the command can be interrupted and repeated. Each
seed takes twice as long as `make demo`.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys

from mmsr1_jax.config import Config
from mmsr1_jax.data import QuestionSource, tiny_world, write_parquet
from mmsr1_jax.data.construction import pipeline
from mmsr1_jax.data.tiny_world.world import FACTS
from mmsr1_jax.scripts.demo import format_table, read_outcomes
from tests.construction_server import ModelServer
from tests.servers import serve

WORKFLOWS = "('direct', 'rag', 'on_demand')"
MAX_DIFFERENCE = 5.0  # points


def construct(folder: pathlib.Path, rate: float) -> pathlib.Path:
    """Write the world and 500 constructed questions of it, and return their file."""
    world = tiny_world.World.generate()
    out = folder / "constructed"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / pipeline.PARQUET).is_file():
        run("scripts.tiny_world", f"--out={folder / 'world'}", "--sft_examples=0")
        every = 7 * len(world.landmarks_of("unmet"))
        write_parquet(folder / "unmet.parquet", tiny_world.questions(world, "unmet", every))
        names = "\n".join(landmark.name for landmark in world.landmarks)
        (folder / "concepts.txt").write_text(names + "\n")
        with serve(ModelServer(world, rate, facts=FACTS).app()) as url:
            pipeline.construct(settings(folder, url), out)
    count = len(QuestionSource(str(out / pipeline.PARQUET)))
    print(f"{count} constructed questions", flush=True)
    return out / pipeline.PARQUET


def settings(folder: pathlib.Path, url: str) -> Config:
    """Return the settings of the construction.

    The check `title` is left out, since the demo also asks for names and cities, which the titles
    of pictures state.
    """
    config = Config()
    config.tools.index = str(folder / "world" / "index")
    config.services.writer_url = config.services.checker_url = url
    config.services.max_qps = 1e5
    options = config.construction
    options.concepts = (str(folder / "concepts.txt"),)
    options.min_side, options.min_page_chars = 56, 40
    options.pages_per_concept, options.questions_per_page = 3, 4
    options.checks = ("blind", "shown", "answerable", "sound")
    options.heldout_sets = (str(folder / "unmet.parquet"),)
    options.test_sets = (str(folder / "world" / "heldout.parquet"),)
    options.max_questions = 500
    return config


def train_and_evaluate(folder: pathlib.Path, name: str, data: pathlib.Path, seed: int) -> None:
    """Train the demo's policy on questions, and evaluate it on the demo's held-out questions."""
    out = folder / f"{name}-{seed}"
    if (out / "after" / "results.json").is_file():
        return
    world = folder / "world"
    tests = f"('{world / 'heldout.parquet'}', '{world / 'unmet.parquet'}')"
    run(
        "train", "--config=configs/tiny.py", f"--workdir={out / 'run'}",
        f"--config.data.train=('{data}',)", f"--config.tools.index={world / 'index'}",
        f"--config.eval.data={tests}", f"--config.run.seed={seed}",
    )  # fmt: skip
    run(
        "evaluate", f"--workdir={out / 'run'}", f"--out={out / 'after'}",
        f"--config.eval.workflows={WORKFLOWS}",
    )  # fmt: skip


def evaluate_before(folder: pathlib.Path) -> pathlib.Path:
    """Evaluate the initial policy, and return the directory of the results."""
    out, world = folder / "before", folder / "world"
    tests = f"('{world / 'heldout.parquet'}', '{world / 'unmet.parquet'}')"
    if not (out / "results.json").is_file():
        run(
            "evaluate", "--config=configs/tiny.py", f"--model={tiny_world.POLICY}", f"--out={out}",
            f"--config.tools.index={world / 'index'}", f"--config.eval.data={tests}",
            "--config.eval.workflows=('on_demand',)",
        )  # fmt: skip
    return out


def run(module: str, *arguments: str) -> None:
    print(f"mmsr1 {module} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", f"mmsr1_jax.{module}", *arguments], check=True)


def accuracy(outcomes) -> float:
    """Return the percentage of correct answers on demand."""
    on_demand = [outcome for outcome in outcomes if outcome.workflow == "on_demand"]
    return 100 * statistics.mean(float(outcome.correct["em"] or 0) for outcome in on_demand)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/construction"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.1)
    options = parser.parse_args()
    folder = options.out.resolve()
    made = construct(folder, options.rate)
    data = {"own": folder / "world" / "train.parquet", "constructed": made}
    for seed in range(options.seeds):
        for name, file in data.items():
            train_and_evaluate(folder, name, file, seed)
    before = read_outcomes(evaluate_before(folder))
    means = {}
    for name in data:
        after = [read_outcomes(folder / f"{name}-{s}" / "after") for s in range(options.seeds)]
        means[name] = [accuracy(outcomes) for outcomes in after]
        for source in sorted({outcome.source for outcome in before}):
            print(f"\ntrained on {name} questions, {source}\n{format_table(before, after, source)}")
    difference = statistics.mean(means["constructed"]) - statistics.mean(means["own"])
    for name, values in means.items():
        print(f"{name}: {', '.join(f'{value:.1f}' for value in values)} % correct on demand")
    print(f"constructed - own: {difference:+.1f} points (at most {MAX_DIFFERENCE:g} apart)")
    return 0 if abs(difference) <= MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
