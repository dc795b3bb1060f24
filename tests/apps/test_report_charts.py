"""Charts of the report, and its links to traces."""

from xml.etree import ElementTree

import numpy as np
import pytest

from mmsr1_jax.apps.report import charts, page, reader

SVG = "{http://www.w3.org/2000/svg}"


def draw(metrics, steps=None):
    steps = steps or list(range(1, len(next(iter(metrics.values()))) + 1))
    return charts.draw_charts({"steps": steps, "metrics": metrics, "steps_per_point": 1})


def texts(chart):
    return [
        "".join(node.itertext()) for node in ElementTree.fromstring(chart["svg"]).iter(f"{SVG}text")
    ]


def test_a_chart_has_its_text_as_text_and_a_description():
    drawn = draw(
        {"reward": [0.25, None, 0.5], "accuracy": [0.0, 0.5, 1.0], "loss": [3.0, 2.0, 1.0]}
    )
    (panel,) = drawn["panels"]
    assert panel["title"] == "Reward and accuracy"
    assert panel["alt"] == (
        "Reward and accuracy, steps 1 to 3: reward from 0.25 to 0.5; accuracy from 0 to 1."
    )
    assert {"reward", "accuracy", "step"} <= set(texts(panel))
    series = [(curve["label"], curve["metric"]) for curve in panel["series"]]
    assert series == [("reward", "reward"), ("accuracy", "accuracy")]
    assert list(drawn["metrics"]) == ["accuracy", "loss", "reward"]
    assert drawn["metrics"]["loss"]["alt"] == "loss, steps 1 to 3: loss from 3 to 1."


def test_labels_of_categories_are_shown_unchanged():
    labels = ["<b>other</b>", "_private", "$x_1$ & co", "漢字"]
    drawn = draw({f"search_by_category/{label}": [0.1, 0.2] for label in labels})
    shown = [text.strip() for text in texts(drawn["panels"][0])]
    assert set(labels) <= set(shown)


def test_characters_that_xml_cannot_contain_are_replaced():
    drawn = draw({"end/\x00\ud800": [1.0, 1.0], "end/answer": [0.0, 0.0]})
    assert "??" in texts(drawn["panels"][0])


@pytest.mark.parametrize("values", [[0.0], [1e308, -1e308], [5.0] * 40, [1e-300, 2e-300]])
def test_extreme_values_are_tokens(values):
    drawn = draw({"time/rollout": values, "time/update": values, "reward": values})
    assert len(drawn["panels"]) == 2 and len(drawn["metrics"]) == 3
    for chart in (*drawn["panels"], *drawn["metrics"].values()):
        coordinates = [
            path.get("d") for path in ElementTree.fromstring(chart["svg"]).iter(f"{SVG}path")
        ]
        assert not any("nan" in text or "inf" in text for text in coordinates)
    assert draw({"reward": [0.5]}, steps=[10**30])["panels"]


def test_a_long_curve_is_smoothed_and_bounded_in_size():
    values = np.random.default_rng(0).uniform(size=500).tolist()
    chart = draw({"loss": values})["metrics"]["loss"]
    lines = [
        len(path.get("d").split("L"))
        for path in ElementTree.fromstring(chart["svg"]).iter(f"{SVG}path")
        if "L" in path.get("d")
    ]
    assert sum(count > 100 for count in lines) == 2  # the values, and their moving average
    assert len(chart["svg"]) < 40_000


def test_no_metrics_have_no_charts():
    assert charts.draw_charts({}) == {}


def test_traces_of_a_run_are_linked_relative_to_the_page(tmp_path):
    run, out = tmp_path / "run", tmp_path / "pages" / "report.html"
    (run / "profile" / "plugins").mkdir(parents=True)
    (run / "timelines").mkdir()
    for name in ("000001.json", "a b.json"):
        (run / "timelines" / name).write_text("{}")
    (run / "timelines" / "notes.txt").write_text("")
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    out.parent.mkdir()
    data = reader.read(run, 10)
    page.write(out, data)
    html = out.read_text()
    for url in ("run/profile", "run/timelines/000001.json", "run/timelines/a%20b.json"):
        assert f'"../{url}"' in html
    assert "notes.txt" not in html
    assert reader.find_traces(run / "metrics.jsonl") == []
