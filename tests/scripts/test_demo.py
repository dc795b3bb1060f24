"""The demo's table of handwritten episodes with known metrics."""

import json
import subprocess
import sys

import pytest

from mmsr1_jax.data import tiny_world, write_parquet
from mmsr1_jax.scripts import demo
from tests.programs import ROOT

KINDS = ("image_search", "text_search")


def line(number, workflow, category, correct, searches, source="held out"):
    calls = [{"action": KINDS[i], "status": "ok"} for i in range(searches)]
    return {
        "workflow": workflow, "group": number, "sample": 0, "id": str(number), "question": "?",
        "source": source, "category": category, "answer": "a" if correct else "b", "answers": ["a"],
        "reward": {"reward": 0.0, "format": True}, "calls": calls, "allowed": 2, "tokens": 9,
        "tokens_sampled": 3, "turns": [{}] * (searches + 1), "end": "answer",
    }  # fmt: skip


def write(folder, lines):
    folder.mkdir()
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "episodes.jsonl").write_text(text)
    return demo.read_outcomes(folder)


def test_the_table_has_the_metrics_of_each_workflow(tmp_path):
    """Four questions in each of two categories: (number correct, that search, searches of each)."""

    def workflow(name, free, both):
        parts = [("free", *free), ("both", *both)]
        return [
            line(4 * group + i, name, category, i < correct, searches * (i < searching))
            for group, (category, correct, searching, searches) in enumerate(parts)
            for i in range(4)
        ]

    before = write(tmp_path / "before", workflow("on_demand", (2, 2, 1), (1, 2, 2)))
    after = [
        write(
            tmp_path / f"after{number}",
            [
                *workflow("direct", (4, 0, 0), (0, 0, 0)),
                *workflow("rag", (3, 4, 2), (4, 4, 2)),
                *workflow("on_demand", (4, number, 1), (4, 4, 2)),
                line(99, "on_demand", "free", False, 0, source="another"),
            ],
        )
        for number in (0, 1)
    ]
    text = demo.format_table(before, after, "held out").splitlines()
    cells = {row[:18].strip(): " ".join(row[18:].split()) for row in text[2:6]}
    assert text[0].split()[-2:] == ["both", "free"]
    # correct, searches/question, search; then correct / search of both and of free
    assert cells["direct"] == "50.0 0.00 0.0 0.0 / 0.0 100.0 / 0.0"
    assert cells["forced search"] == "87.5 2.00 100.0 100.0 / 100.0 75.0 / 100.0"
    assert cells["on demand, before"] == "37.5 0.75 50.0 25.0 / 50.0 50.0 / 50.0"
    assert cells["on demand, after"] == "100.0 1.06 56.2 100.0 / 100.0 100.0 / 12.5"
    assert "+12.5 points with 53.1 % of the searches" in text[-2]
    assert text[-2].endswith("; 95 % interval: +0.0 to +37.5 points")
    assert text[-1] == (
        "episodes that search: 100.0 % of questions that need it, 12.5 % of questions that do not"
    )


def test_a_category_missing_after_training_is_an_error(tmp_path):
    def workflows(categories):
        return [
            line(number, name, category, True, 1)
            for name in ("direct", "rag", "on_demand")
            for number, category in enumerate(categories)
        ]

    before = write(tmp_path / "before", workflows(["free", "both"]))
    after = write(tmp_path / "after", workflows(["free"]))
    with pytest.raises(ValueError, match="^direct: no episodes of --after .* the category 'both'"):
        demo.format_table(before, [after], "held out")


def test_undefined_metrics_are_dashes(tmp_path):
    """No episode of forced search could be run; with one question the interval is wide."""
    lines = [line(0, name, "free", True, 0) for name in ("direct", "rag", "on_demand")]
    lines[1]["end"] = "error"
    outcomes = write(tmp_path / "out", lines)
    text = demo.format_table(outcomes, [outcomes], "held out").splitlines()
    assert text[3].split()[-5:] == ["-", "-", "100.0", "/", "-"]
    assert "of the searches" not in text[-2]
    assert text[-2].endswith("+0.0 points; 95 % interval: -79.3 to +79.3 points")
    assert text[-1] == "episodes that search: 0.0 % of questions that do not"


def test_the_search_rate_weights_questions_equally(tmp_path):
    lines = [
        line(number, name, category, True, searches)
        for name in ("direct", "rag", "on_demand")
        for number, (category, searches) in enumerate(
            [("free", 0), ("both", 1), ("text", 0), ("text", 0), ("text", 0)]
        )
    ]
    outcomes = write(tmp_path / "out", lines)
    text = demo.format_table(outcomes, [outcomes], "held out").splitlines()
    assert "25.0 % of questions that need it, 0.0 % of questions that do not" in text[-1]


def test_curves_are_plotted(tmp_path):
    steps = [
        {"step": i, "reward": 0.1 * i, "accuracy": 0.1 * i, "search/any": 0.5, "search/text": 0.1,
         "search/image": 0.2, "search/both": 0.2, "search/none": 0.5,
         "search_by_category/free": 0.3}
        for i in range(1, 5)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    demo.plot_curves([tmp_path], tmp_path / "out" / "curves.png")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.proof
def test_the_table_agrees_with_evaluate(tmp_path):
    """All workflows on questions of the tiny world."""
    world = tiny_world.World.generate()
    tiny_world.write_index(world, tmp_path / "index")
    write_parquet(tmp_path / "q.parquet", tiny_world.questions(world, "heldout", 24))
    subprocess.run(
        [sys.executable, "-m", "mmsr1_jax.evaluate", "--config=configs/tiny.py",
         f"--model={tiny_world.POLICY}", f"--config.tools.index={tmp_path / 'index'}",
         f"--config.eval.data=('{tmp_path / 'q.parquet'}',)", f"--out={tmp_path / 'out'}",
         "--config.eval.workflows=('direct', 'rag', 'on_demand', 'agent')"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    outcomes = demo.read_outcomes(tmp_path / "out")
    table = demo.format_table(outcomes, [outcomes], "tiny_world heldout").splitlines()
    names = {"direct": "direct", "forced search": "rag", "on demand, before": "on_demand",
             "on demand, after": "on_demand", "agent": "agent"}  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())["workflows"]
    rows = {row[:18].strip(): row[18:].split() for row in table[2:7]}
    assert rows.keys() == names.keys()
    for row, name in names.items():
        metrics = results[name]
        parts = [metrics["by_category"][category] for category in sorted(metrics["by_category"])]
        assert len(parts) == 4
        expected = [100 * metrics["accuracy"]["em"]["mean"], metrics["searches"]["per_episode"]]
        expected.append(100 * metrics["searches"]["episode_fraction"])
        for part in parts:
            expected += [
                100 * part["accuracy"]["em"]["mean"],
                100 * part["searches"]["episode_fraction"],
            ]
        shown = [float(cell) for cell in rows[row] if cell != "/"]
        assert shown == pytest.approx(expected, abs=0.051), row
    assert results["rag"]["searches"]["per_episode"] == 2
    assert results["direct"]["searches"]["episode_fraction"] == 0
