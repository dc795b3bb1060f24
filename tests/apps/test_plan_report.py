"""Verdicts, advice and output of a plan."""

import dataclasses
import json
import types

import jax
import pytest

from mmsr1_jax.apps.plan import memory, report, targets
from mmsr1_jax.apps.plan.estimate import Calibration
from mmsr1_jax.apps.plan.figures import Figures
from mmsr1_jax.apps.plan.memory import Footprint
from mmsr1_jax.apps.plan.parts import Part
from mmsr1_jax.apps.plan.targets import CHIPS, Target
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import tiny_world
from mmsr1_jax.scripts import plan as command
from tests.programs import run_module

GIB = 2**30
STATE = {
    memory.POLICY: 4 * GIB, memory.OPTIMIZER: 8 * GIB, memory.ENGINE: 25 * GIB,
    memory.CACHE: 20 * GIB,
}  # fmt: skip


def footprint(name, phase, state, argument, temporary, output=0):
    return Footprint(
        name=name, phase=phase, state=frozenset(state), argument_bytes=argument * GIB,
        output_bytes=output * GIB, temporary_bytes=temporary * GIB,
    )  # fmt: skip


FOOTPRINTS = [
    footprint("score", "score", [memory.POLICY], argument=5, temporary=3),
    footprint("gradient", "update", [memory.POLICY], argument=9, temporary=10, output=1),
    footprint("step", "update", [memory.POLICY, memory.OPTIMIZER], argument=16, temporary=1),
]


def cache(lanes=40, is_set=False):
    """Lanes of 0.5 GiB in 4 pages of 128 tokens; one page more if the setting is in tokens."""
    return memory.CacheSize(
        pages=4 * lanes + 1, page_bytes=GIB / 8, lanes=lanes, pages_per_lane=4, lane_bytes=0.0,
        tokens=128, is_set=is_set,
    )  # fmt: skip


def phases(limit=80, state=STATE, extra=None, offload=False, missing=()):
    config = settings.Config()
    config.update.offload = offload
    absent = memory.absent_state(config)
    found = memory.phases(state, FOOTPRINTS, limit * GIB, extra or {}, absent, missing)
    return {phase.name: phase for phase in found}


PARTS = (Part("text", 3 * GIB, 0.3, 8e12), Part("log_probs", GIB, 0.1, 2e12))


def make_plan(phases, lanes=40, is_set=False, hosts=1, target="h100:1x8", lockstep=False):
    devices = [types.SimpleNamespace(process_index=i % hosts) for i in range(8)]
    gradient = Figures(
        name="gradient", phase="update", needed_bytes=GIB, flops=1e12, moved_bytes=4 * GIB,
        seconds=0.4, efficiency=0.795, parts=PARTS,
    )  # fmt: skip
    return report.Plan(
        target=Target(target, CHIPS[target.split(":")[0]], devices), model="m",
        calibration=Calibration(0.0, 1e-3, 1.0),
        programs=[gradient],
        phases=list(phases.values()), cache=cache(lanes, is_set), filled=4096, tensor=1,
        crosses_hosts=False, lockstep=lockstep,
    )  # fmt: skip


def test_a_phase_holds_its_state_and_its_largest_program():
    """The engine is released after a rollout."""
    result = phases(extra={"load": {"new engine policy": 25 * GIB}})
    assert {name: phase.bytes / GIB for name, phase in result.items()} == {
        "rollout": 57,
        "load": 12 + 25,
        "score": 12 + 1 + 3,  # a batch and temporaries
        "update": 12 + 5 + 1 + 10,  # of the gradient, which needs more than the step
    }
    assert phases(offload=True)["rollout"].bytes == (57 - 12) * GIB
    for phase in result.values():
        assert phase.bytes == sum(phase.parts.values())


def test_a_phase_fits_up_to_its_limit():
    assert [p.fits for p in phases(limit=57).values()] == [True, True, True, True]
    assert [p.name for p in phases(limit=56.9).values() if not p.fits] == ["rollout"]


def test_a_phase_without_all_its_programs_has_no_verdict_unless_it_is_too_large_already():
    result = phases(limit=57, missing={"rollout", "load"})
    assert [p.fits for p in result.values()] == [None, None, True, True]
    plan = make_plan(result)
    assert plan.largest_cache is None and plan.most_lanes is None
    text, values = (f(plan, settings.Config()) for f in (report.as_text, report.as_json))
    assert "| load | 12.00 GiB | 57.00 GiB | not compiled |" in text
    assert "| score | 16.00 GiB | 57.00 GiB | fits |" in text
    assert "at most" not in text
    assert [phase["fits"] for phase in values["phases"]] == [None, None, True, True]
    assert values["cache"]["largest"] is None and values["cache"]["most_lanes"] is None
    assert phases(limit=56, missing={"rollout"})["rollout"].fits is False


def test_the_most_lanes_fit_and_one_more_does_not():
    plan = make_plan(phases(limit=60))
    assert plan.most_lanes == 46

    def with_lanes(lanes):
        return phases(limit=60, state={**STATE, memory.CACHE: lanes * GIB / 2})

    assert all(p.fits for p in with_lanes(46).values())
    assert not all(p.fits for p in with_lanes(47).values())
    assert make_plan(phases(limit=37.4)).most_lanes == 0
    assert make_plan(phases(limit=27, state={**STATE, memory.ENGINE: 0})).most_lanes == 0  # update


def test_a_cache_of_a_number_of_tokens_has_full_lanes_and_a_page_to_copy_to():
    plan = make_plan(phases(limit=60), is_set=True)
    pages = plan.largest_cache // 128
    assert (pages, plan.largest_cache % 128) == (161 + 3 * 8, 0)
    assert plan.most_lanes == (pages - 1) // 4 == 46
    assert make_plan(phases(limit=37.5), is_set=True).largest_cache == 5 * 128
    assert make_plan(phases(limit=37.4), is_set=True).largest_cache == 0  # less than an episode
    text = report.as_text(plan, settings.Config())
    assert f"at most rollout.cache_tokens={185 * 128}, 46 full lanes fits" in text


@pytest.mark.parametrize(
    ("phase", "limit", "state", "changes", "expected"),
    [
        ("rollout", 57, {}, {}, ""),
        ("rollout", 54, {}, {"decode_batch_size": 16}, "rollout.lanes=34"),
        ("rollout", 54, {memory.REFERENCE: 3 * GIB}, {}, "rollout.lanes=28"),
        ("rollout", 57, {memory.REFERENCE: 3 * GIB}, {}, "objective.reference=host"),
        ("rollout", 54, {}, {"decode_batch_size": 40}, "update.offload=True"),
        ("rollout", 44.9, {}, {"decode_batch_size": 40}, "mesh.tensor=2"),
        ("rollout", 39, {}, {}, "rollout.lanes=4 with rollout.decode_batch_size=4"),
        ("rollout", 10, {}, {}, "a target with more memory or devices (largest part: engine poli"),
        ("update", 22, {}, {}, "model.remat=full"),
        ("update", 14, {}, {}, "a target with more memory or devices (largest part: gradient tem"),
    ],
)
def test_advice_names_a_setting_that_frees_enough(phase, limit, state, changes, expected):
    config = settings.Config()
    for name, value in changes.items():
        setattr(config.rollout, name, value)
    result = phases(limit=limit, state={**STATE, **state})
    advice = report.advice(result[phase], make_plan(result), config)
    assert advice.startswith(expected) and (advice or not expected)
    if "largest part" not in expected:
        assert advice == expected


def test_advice_for_a_cache_of_a_number_of_tokens_holds_at_least_an_episode():
    def advice(limit):
        result = phases(limit=limit)
        return report.advice(result["rollout"], make_plan(result, is_set=True), settings.Config())

    assert advice(56.9) == f"rollout.cache_tokens={160 * 128}"
    assert advice(37.5) == f"rollout.cache_tokens={5 * 128}"
    assert "cache_tokens" not in advice(37.4)


@pytest.mark.parametrize(
    "rollout",
    [
        pytest.param({"lanes": 12}, marks=pytest.mark.proof),
        {"lanes": 12, "cache_tokens": 8192},
    ],
)
def test_a_phase_fits_with_the_setting_that_is_advised(rollout, tmp_path, monkeypatch):
    """On this machine's devices, with so little memory that the KV cache must shrink."""
    config = settings.Config()
    config.update.pack_length, config.update.pack_windows = 64, 2
    config.turns.max_episode_tokens, config.rollout.decode_batch_size = 1024, 2
    for name, value in rollout.items():
        setattr(config.rollout, name, value)

    def phase(limit):
        chip = dataclasses.replace(CHIPS["h100"], memory=limit)
        target = Target("h100:1x8", chip, jax.devices())
        monkeypatch.setattr(targets, "make_target", lambda name: target)
        model = str(tiny_world.POLICY)
        plan = command.make_plan(config, model, "h100:1x8", ["fork", "step"], tmp_path)
        return plan, next(p for p in plan.phases if p.name == "rollout")

    plan, before = phase(1e12)
    assert before.fits is not False and before.bytes == sum(before.parts.values())
    limit = before.bytes - 0.4 * plan.cache.bytes
    plan, before = phase(limit)
    assert before.fits is False
    setting, _, value = report.advice(before, plan, config).partition("=")
    assert setting == plan.cache.setting
    setattr(config.rollout, setting.removeprefix("rollout."), int(value))
    _, after = phase(limit)
    assert after.fits is not False
    step = config.rollout.page_size if plan.cache.is_set else 1
    setattr(config.rollout, setting.removeprefix("rollout."), int(value) + step)
    assert phase(limit)[1].fits is False


def test_the_report_and_its_json_agree():
    plan, config = make_plan(phases(limit=54)), settings.Config()
    values = json.loads(json.dumps(report.as_json(plan, config)))
    assert values["target"] == "h100:1x8"
    (program,) = values["programs"]
    assert {"name", "argument_bytes", "temporary_bytes", "moved_bytes", "needed_bytes", "flops",
            "cycles", "kernels", "collectives"} <= set(program)  # fmt: skip
    by_name = {phase["name"]: phase for phase in values["phases"]}
    assert by_name["rollout"]["bytes"] == 57 * GIB and not by_name["rollout"]["fits"]
    text = report.as_text(plan, config)
    assert "| rollout | 57.00 GiB | 54.00 GiB | does not fit: rollout.lanes=34 |" in text
    assert "| update | 28.00 GiB | 54.00 GiB | fits |" in text
    assert "at most rollout.lanes=34 fits" in text
    assert (
        "gradient by part: text 3.00 GiB (75%), 300.0 ms (75%), 8.0 TFLOP; "
        "log_probs 1.00 GiB (25%), 100.0 ms (25%), 2.0 TFLOP.\n\n| phase |" in text
    )
    assert program["parts"][1] == {
        "name": "log_probs", "bytes": GIB, "seconds": 0.1, "flops": 2e12,
    }  # fmt: skip
    assert "| 400.0 ms | 80% |" in text and program["efficiency"] == 0.795
    assert "process on each" not in text
    several = report.as_text(make_plan(phases(), hosts=2), config)
    assert "A run on this target has one process on each of 2 hosts." in several
    assert "rollout.lockstep" not in several
    assert "rollout.lockstep" in report.as_text(make_plan(phases(), lockstep=True), config)


def test_a_plan_of_a_small_run(tmp_path, monkeypatch):
    """On this machine's devices in place of an accelerator's."""
    local = Target("h100:1x8", CHIPS["h100"], jax.devices())
    monkeypatch.setattr(targets, "make_target", lambda name: local)
    config = settings.Config()
    config.update.pack_length, config.update.pack_windows = 64, 2
    model = str(tiny_world.POLICY)
    plan = command.make_plan(config, model, "h100:1x8", ["score", "step"], tmp_path)
    assert [p.name for p in plan.programs] == ["score", "step"]
    assert all(p.seconds >= p.bound_seconds > 0 for p in plan.programs)
    # All programs of an update are `gradient` and `step`.
    assert {p.name: p.fits for p in plan.phases} == {
        "rollout": None, "load": None, "score": True, "update": None,
    }  # fmt: skip
    assert plan.largest_cache is None
    text = report.as_text(plan, config)
    assert report.as_text(
        command.make_plan(config, model, "h100:1x8", ["score", "step"], tmp_path), config
    ) == text  # fmt: skip
    with pytest.raises(UserError, match="--programs=fly: this run has load, encode .* step"):
        command.make_plan(config, model, "h100:1x8", ["fly"], tmp_path)


def test_the_command_ends_with_one_line_for_an_unknown_target():
    result = run_module(
        "--config=tiny", "--topology=v5p", module="mmsr1_jax.scripts.plan", devices=1
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --topology=v5p: must be a chip and a shape")
    assert result.stderr.count("\n") == 1
