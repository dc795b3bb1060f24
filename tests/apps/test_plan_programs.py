"""Programs of a plan: what they need by formula, state of a device, cached figures."""

import dataclasses
import functools
import json
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.apps.plan import figures, memory, needs, parts, programs, targets, traffic
from mmsr1_jax.apps.plan.engine import make_engine
from mmsr1_jax.apps.plan.estimate import Calibration
from mmsr1_jax.apps.plan.targets import CHIPS, Target
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import output_head, sharding
from mmsr1_jax.models.checkpoint import abstract_model
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.rl.packing import RowShape
from mmsr1_jax.scripts import random_policy
from tests.programs import ROOT

MODEL = random_policy.CONFIG
CALIBRATION = Calibration(0.0, 1e-3, 1.0)


def target(devices=None):
    return Target("test:1x8", CHIPS["h100"], devices or jax.devices())


def config(**sections):
    result = settings.Config()
    result.update.pack_length, result.update.pack_windows = 64, 2
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(result, section), name, value)
    return result


def shipped(name):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def trainer_programs(config, model=MODEL, mesh=None):
    mesh = mesh or sharding.make_mesh()
    learner = programs.make_learner(config, model, mesh)
    return {p.name: p for p in programs.trainer_programs(config, model, mesh, learner)}


def test_a_micro_batch_has_the_rows_of_all_hosts(monkeypatch):
    """Also if this process stands for one host of several."""
    mesh = sharding.make_mesh(1, 8, 1)
    alone = trainer_programs(config(), mesh=mesh)["gradient"]
    monkeypatch.setattr(sharding, "_num_processes", lambda mesh: 4)
    several = trainer_programs(config(), mesh=mesh)["gradient"]
    assert several.flops == alone.flops
    for program in (alone, several):
        (tokens,) = {
            x.shape
            for x in jax.tree.leaves(program.lower().in_avals)
            if x.shape[1:] == (64,) and x.dtype == np.int32
        }
        assert tokens == (8, 64)


def test_flops_by_formula_are_those_of_the_compiled_forward_pass():
    work = needs.Work(rows=2, length=64, patches=128, image_patches=128, columns=64)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = abstract_model(MODEL, attention="xla", logprob_chunk=64)
    graph, params = nnx.split(model)
    batch = programs.abstract_batch(RowShape(2, 64, 2), 64, MODEL, mesh)
    params = sharding.abstract_params(params, mesh)

    def forward(params, batch):
        model = nnx.merge(graph, params)
        return model.statistics(batch.rows, batch.logit_columns, batch.targets)

    compiled = jax.jit(forward).lower(params, batch).compile()
    # Two of four blocks attend to the whole image.
    counted = traffic.measure(compiled.as_text(), branches={"/cond": (0.5, 0.5)}).flops
    expected = needs.forward_flops(MODEL, work)
    # The XLA implementation computes all pairs, not only those below the diagonal.
    assert counted == sum(expected.values()) + expected["text attention"]


def test_multiplied_weights_are_the_kernels_of_the_model():
    params = nnx.split(abstract_model(MODEL))[1]
    flat = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(params)}
    kernels = [x for path, x in flat.items() if path.endswith(("kernel", "text/head"))]
    count = sum(int(np.prod(x.get_value().shape)) for x in kernels)
    assert sum(needs.multiplied_weights(MODEL).values()) == count


def test_a_backward_pass_costs_two_forward_passes_where_weights_are_trained():
    work = needs.Work(rows=1, length=64, patches=64, image_patches=64, columns=64)
    parts = needs.forward_flops(MODEL, work)
    vision = parts["vision"] + parts["vision attention"]
    total = sum(parts.values())
    update = settings.Update()
    assert needs.gradient_flops(MODEL, work, update) == pytest.approx(3 * total)
    update.freeze_vision = True
    assert needs.gradient_flops(MODEL, work, update) == pytest.approx(3 * total - 2 * vision)
    lora = settings.Update(lora_rank=8)
    expected = 3 * total - 2 * vision - parts["text"] - parts["head"]
    assert needs.gradient_flops(MODEL, work, lora) == pytest.approx(expected)


def test_with_full_rematerialisation_what_has_a_backward_pass_is_computed_again():
    """Products of N weights and T tokens then cost 8 N T."""
    work = needs.Work(rows=1, length=64, patches=64, image_patches=64, columns=64)
    parts = needs.forward_flops(MODEL, work)
    vision = parts["vision"] + parts["vision attention"]
    update, total = settings.Update(), sum(parts.values())

    def recomputed(remat):
        return needs.recomputed_flops(MODEL, work, update, remat)

    assert needs.gradient_flops(MODEL, work, update) + recomputed("full") == pytest.approx(
        4 * total
    )
    # The logits are never kept.
    assert recomputed("none") == recomputed("dots") == parts["head"]
    update.freeze_vision = True
    assert recomputed("full") == pytest.approx(total - vision)


@functools.cache
def gradient_costs():
    """Return the costs of the gradient of a micro-batch on eight devices."""
    program = trainer_programs(config(model={"remat": "full", "logprob_chunk": 16}))["gradient"]
    text = program.lower().compile().as_text()
    return traffic.measure(text, kernels=program.kernels, branches=program.branches)


def test_the_parts_of_a_gradient_are_those_of_both_passes():
    costs = gradient_costs()
    by_name = {part.name: part for part in parts.by_part(costs, [1.0] * len(costs.instructions))}
    assert list(by_name) == ["vision", "text", "log_probs", "other"]
    work = needs.Work(rows=1, length=64, patches=128, image_patches=128, columns=64)
    flops = needs.forward_flops(MODEL, work)
    # Forward, forward again but for each layer's last product, and gradients by activations and
    # weights. XLA computes all pairs of tokens.
    assert 3.5 < by_name["text"].flops / (flops["text"] + 2 * flops["text attention"]) < 4
    assert by_name["log_probs"].flops == 4 * flops["head"]
    assert by_name["other"].flops == 0
    assert sum(part.bytes for part in by_name.values()) == pytest.approx(costs.bytes)
    assert sum(part.seconds for part in by_name.values()) == len(costs.instructions)
    assert by_name["other"].bytes < 0.05 * costs.bytes  # the sum of gradients
    assert parts.by_part(traffic.Traffic((), (), ()), []) == ()


def test_the_head_is_gathered_once_for_both_passes(monkeypatch):
    table = MODEL.text.vocab_size, MODEL.text.hidden_size

    def gathers(costs):
        # Their path is that of the scope, or from jax 0.11 on that of the parameter.
        return costs.gathers(table, "log_probs") + costs.gathers(table, "head")

    assert gathers(gradient_costs()) == 1

    # A table that stays sharded is gathered in each pass.
    monkeypatch.setattr(output_head.sharding, "gather", lambda x, *axes: x)
    assert gathers(gradient_costs.__wrapped__()) != 1


@pytest.mark.parametrize(
    ("name", "policy_and_moments", "engine", "lane"),
    [("qwen7b", 11.6, 15.4, 448), ("qwen3b", 5.3, 7.0, 288)],
)
def test_state_of_the_shipped_configs(name, policy_and_moments, engine, lane):
    """In GiB and MiB, as computed by hand for eight devices in `docs/scaling.md`."""
    run, mesh = shipped(name), sharding.make_mesh()
    model = programs.model_config(run.run.model)
    learner = programs.make_learner(run, model, mesh)
    rollout = make_engine(run, model, jax.devices(), 1)
    state, cache = memory.state_bytes(run, learner, rollout), memory.cache_size(run, rollout)
    gib = 2**30
    total = (state[memory.POLICY] + state[memory.OPTIMIZER]) / gib
    assert total == pytest.approx(policy_and_moments, abs=0.06)
    assert state[memory.ENGINE] / gib == pytest.approx(engine, abs=0.06)
    assert cache.pages_per_lane * cache.page_bytes == lane * 2**20
    hidden = model.text.hidden_size * 2
    pages = run.rollout.cache_tokens / 8192 * lane * 2**20
    assert cache.bytes == state[memory.CACHE] == pages + (run.rollout.lanes + 1) * hidden


@pytest.mark.parametrize("rollout", [{"lanes": 6}, {"lanes": 6, "cache_tokens": 1280}])
@pytest.mark.parametrize("pages", [-7.5, -0.5, 0.0, 20.5])
def test_the_largest_cache_that_fits_is_that_of_the_setting(rollout, pages):
    """A cache of the value fits into the bytes, one of the next value does not."""
    run = config(rollout={**rollout, "page_size": 64}, turns={"max_episode_tokens": 256})

    def size(**changes):
        for name, value in changes.items():
            setattr(run.rollout, name, value)
        return memory.cache_size(run, make_engine(run, MODEL, jax.devices(), 1))

    cache = size()
    name = cache.setting.removeprefix("rollout.")
    assert name == ("cache_tokens" if "cache_tokens" in rollout else "lanes")
    limit = cache.bytes + pages * cache.page_bytes
    value = cache.value(pages * cache.page_bytes)
    step = 64 if cache.is_set else 1
    assert size(**{name: value}).bytes <= limit < size(**{name: value + step}).bytes


def test_loading_adapters_holds_the_merged_kernels():
    run, mesh = config(update={"lora_rank": 4, "lora_alpha": 4.0}), sharding.make_mesh()
    learner = programs.make_learner(run, MODEL, mesh)
    itemsize = 2 if run.model.dtype == "bfloat16" else 4
    weights = needs.multiplied_weights(MODEL)["text"]  # all linear maps of the layers have adapters
    assert set(run.update.lora_targets) == {"q", "k", "v", "out", "gate", "up", "down"}
    merged = memory.merged_bytes(learner)
    assert merged == pytest.approx(weights * itemsize / mesh.shape["fsdp"])
    state = {memory.ENGINE: 5.0}
    extra = memory.phase_extras(run, learner, state, ["load"])
    assert extra["load"] == {memory.MERGED: merged}
    extra = memory.phase_extras(run, learner, state, [])
    assert extra["load"] == {memory.MERGED: merged, "new engine policy": 5.0}


@pytest.mark.parametrize("update", [{}, {"lora_rank": 4, "lora_alpha": 4.0}])
@pytest.mark.parametrize("program", ["score", "gradient", "step"])
def test_an_abstract_learner_lowers_the_programs_of_a_concrete_one(program, update):
    run, mesh = config(update=update), sharding.make_mesh(1, 4, 2)
    graph, params = nnx.split(random_policy.random_model(MODEL, seed=0))
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    batch = programs.abstract_batch(RowShape(4, 64, 2), 64, MODEL, mesh)
    abstract = programs.make_learner(run, MODEL, mesh)
    concrete = type(abstract)(
        nnx.merge(graph, params), abstract._loss, run.update, mesh, temperature=1.0
    )
    assert sharding.is_abstract(abstract.optimizer) and not sharding.is_abstract(concrete.optimizer)
    texts = [learner.lower(program, batch).as_text() for learner in (abstract, concrete)]
    assert texts[0] == texts[1]


def test_score_belongs_to_a_run_only_if_something_reads_the_log_probs():
    assert "score" in trainer_programs(config(objective={"kl_coef": 0.1}))
    assert "score" in trainer_programs(config(objective={"kl_coef": 0.0, "num_minibatches": 2}))
    assert "score" not in trainer_programs(config(objective={"kl_coef": 0.0}))


def test_figures_come_from_the_cache_unless_something_changed(tmp_path, monkeypatch):
    program = trainer_programs(config())["step"]
    cache = figures.FigureCache(tmp_path, target(), {"config": 1})
    first = figures.compile_figures(program, target(), CALIBRATION, cache)
    assert first.argument_bytes > 0 and first.moved_bytes >= 0.9 * first.needed_bytes > 0
    assert first.bound_seconds <= first.seconds

    def fail():
        raise AssertionError("compiled again")

    again = dataclasses.replace(program, lower=fail)
    assert figures.compile_figures(again, target(), CALIBRATION, cache) == first

    def compiles(cache):
        with pytest.raises(AssertionError, match="compiled again"):
            figures.compile_figures(again, target(), CALIBRATION, cache)
        return True

    assert compiles(figures.FigureCache(tmp_path, target(), {"config": 2}))
    other = dataclasses.replace(target(), name="test:2x4")
    assert compiles(figures.FigureCache(tmp_path, other, {"config": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(targets, "compiler_versions", lambda platform: ["libtpu 0.1"])
        assert compiles(cache)
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "--a_flag=true")
            assert compiles(cache)
    assert figures.compile_figures(again, target(), CALIBRATION, cache) == first


def test_the_bare_product_is_compiled_once_for_a_target(tmp_path, monkeypatch):
    calls = []

    def calibrate(target):
        calls.append(target.name)
        return CALIBRATION

    monkeypatch.setattr(figures.estimate, "calibrate", calibrate)
    other = dataclasses.replace(target(), name="test:2x4")
    for run, chips in (({"config": 1}, target()), ({"config": 2}, target()), ({}, other)):
        cache = figures.FigureCache(tmp_path, chips, run)
        assert figures.calibrate(chips, cache) == CALIBRATION
    assert calls == ["test:1x8", "test:2x4"]
    monkeypatch.setattr(targets, "compiler_versions", lambda platform: ["libtpu 0.1"])
    figures.calibrate(other, cache)
    assert len(calls) == 3


def test_figures_of_a_gradient_have_parts_and_an_efficiency(tmp_path):
    run = config(model={"remat": "full"})
    program = trainer_programs(run)["gradient"]
    cache = figures.FigureCache(tmp_path, target(), {})
    found = figures.compile_figures(program, target(), CALIBRATION, cache)
    assert program.recomputed_flops == pytest.approx(program.flops / 3)
    product = 2 * 8192**3 / CALIBRATION.seconds
    done = program.flops * 4 / 3
    assert found.efficiency == pytest.approx(done / found.seconds / product)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds)
    assert figures.compile_figures(program, target(), CALIBRATION, cache) == found  # stored


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (192.00G) exceeds available HBM (95.74G).", 192.0),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.86G of 15.75G hbm.",
         17.86),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses_has_the_size_that_it_states(message, gib, tmp_path):
    def compile_program():
        raise jax.errors.JaxRuntimeError(message)

    program = dataclasses.replace(
        trainer_programs(config())["gradient"],
        lower=lambda: types.SimpleNamespace(compile=compile_program),
    )
    cache = figures.FigureCache(tmp_path, target(), {})
    refused = figures.compile_figures(program, target(), CALIBRATION, cache)
    assert refused.temporary_bytes == pytest.approx(gib * 2**30)
    assert refused.problem == message


def test_models_by_name_and_by_directory(tmp_path: pathlib.Path):
    assert programs.model_config("qwen2.5-vl-7b") == PRESETS["qwen2.5-vl-7b"]
    assert programs.model_config("build/Qwen2.5-VL-3B") == PRESETS["qwen2.5-vl-3b"]
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hf()))
    assert programs.model_config(str(tmp_path)).text == MODEL.text
    with pytest.raises(UserError, match="--model=gpt: neither a directory nor one of qwen2.5"):
        programs.model_config("gpt")


def test_tensor_groups_that_cross_hosts():
    def mesh(tensor):
        hosts = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
        devices = np.array(hosts).reshape(1, 8 // tensor, tensor)
        return types.SimpleNamespace(devices=devices, shape={"tensor": tensor})

    assert not programs.tensor_groups_cross_hosts(mesh(4))
    assert programs.tensor_groups_cross_hosts(mesh(8))


def test_a_mesh_that_does_not_match_the_target_is_rejected():
    with pytest.raises(UserError, match="does not match 8 devices"):
        programs.make_mesh(config(mesh={"fsdp": 3}), target())
