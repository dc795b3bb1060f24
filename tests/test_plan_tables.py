"""Tables of plans in the documentation."""

import json
import runpy

import pytest

from tests.programs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "plan_tables.py"))
GIB = 2**30


def plan(advice=""):
    program = {
        "name": "decode", "problem": "", "argument_bytes": 3 * GIB, "temporary_bytes": 2**20,
        "moved_bytes": 2 * GIB, "needed_bytes": GIB, "counted_flops": 2e12, "flops": 1e12,
        "bound_seconds": 0.002, "seconds": 1.5, "compile_cpu_seconds": 12.3,
    }  # fmt: skip
    phase = {
        "name": "rollout",
        "bytes": 4 * GIB,
        "limit": 5 * GIB,
        "fits": not advice,
        "advice": advice,
    }
    cache = {"setting": "rollout.lanes", "largest": 8, "most_lanes": 8}
    return {"programs": [program], "phases": [phase], "cache": cache}


def test_the_tables_stand_between_the_markers_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- plan: begin -->\nold\n<!-- plan: end -->\n\nafter\n")
    (tmp_path / "a.v5p:2x2x2.json").write_text(json.dumps(plan()))
    (tmp_path / "b.h100:1x8.json").write_text(json.dumps(plan("rollout.lanes=3")))
    for _ in range(2):  # a second run changes nothing
        SCRIPT["main"](str(tmp_path), str(page))
        text = page.read_text()
        assert text.startswith("before\n\n<!-- plan: begin -->\n\n`a` on v5p:2x2x2:\n\n| program |")
        assert text.endswith("| 8 |\n\n<!-- plan: end -->\n\nafter\n")
        row = "| decode | 3.00 GiB | 1.0 MiB | 2.00 GiB | 1.00 GiB | 2.0 | 1.0 | 2.0 ms | 1.50 s |"
        assert text.count(row) == 2 and "old" not in text
        assert "| `a` on v5p:2x2x2: 5.0 | 4.0 fits | `rollout.lanes=8` | 8 |" in text
        assert "| `b` on h100:1x8: 5.0 | **4.0**: rollout.lanes=3 |" in text


def test_a_phase_without_its_programs_has_no_verdict():
    partial = plan()
    partial["phases"][0]["fits"] = partial["cache"]["largest"] = partial["cache"]["most_lanes"] = (
        None
    )
    assert "| `a`: 5.0 | not compiled |  |  |" in SCRIPT["tables"]({"`a`": partial})


def test_a_page_without_markers_is_left_alone():
    with pytest.raises(ValueError, match="must have the lines"):
        SCRIPT["replace"]("no markers", "text")
