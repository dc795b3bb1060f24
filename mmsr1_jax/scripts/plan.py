"""Predict memory and time of updates on absent accelerators, by compiling their programs.

    mmsr1 plan --config=FILE --topology=v5p:2x2x2 [--model=NAME|DIR] [--programs=gradient,..] \\
        [--json] [--cache=DIR]

The target is a TPU slice (v5e, v5p or v6e and its shape) or GPUs (h100:1x8, h200:4x8: hosts x
GPUs). Its compiler is installed by the extra `tpu` or `cuda`; no device is needed. The model is one
of the released ones, such as qwen2.5-vl-7b, or a directory, of which only `config.json` is read;
without --model it is `config.run.model`.

Prints what each program holds, moves and computes beside what it needs, a lower bound and an
estimate of its time; then the memory of each phase of a step with a verdict, and the setting to
change if it does not fit. Figures are cached in DIR, so that an interrupted plan resumes.
"""

import dataclasses
import json
import pathlib

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.apps.plan import figures, memory, programs, report, targets
from mmsr1_jax.apps.plan.report import Plan
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.logs import log


def main(argv) -> None:
    del argv
    config = _CONFIG.value
    model = _MODEL.value or config.run.model
    if not model:
        raise UserError("give the model as --model or config.run.model")
    cache = pathlib.Path(_CACHE.value) if _CACHE.value else figures.default_directory()
    plan = make_plan(config, model, _TOPOLOGY.value, _PROGRAMS.value, cache)
    if _JSON.value:
        print(json.dumps(report.as_json(plan, config), indent=2))
    else:
        print(report.as_text(plan, config))


def make_plan(
    config: settings.Config, model: str, topology: str, names: list[str], directory: pathlib.Path
) -> Plan:
    """Compile the programs of a run and return its plan.

    Args:
      config: Settings of the run.
      model: Name or directory of the policy.
      topology: Name of the target.
      names: Names of programs; all if empty.
      directory: Directory of cached figures.

    Raises:
      UserError: A name is unknown, the mesh does not match the target, or its compiler is missing.
    """
    shape = programs.model_config(model)
    target = targets.make_target(topology)
    mesh = programs.make_mesh(config, target)
    learner = programs.make_learner(config, shape, mesh)
    all_programs = programs.trainer_programs(config, shape, mesh, learner)
    known = [program.name for program in all_programs]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--programs={unknown[0]}: this run has {', '.join(known)}")
    run = {
        "config": dataclasses.asdict(config), "model": dataclasses.asdict(shape),
        "target": target.name,
    }  # fmt: skip
    cache = figures.FigureCache(directory, run)
    calibration = figures.calibrate(target, cache)
    selected = [program for program in all_programs if not names or program.name in names]
    results = []
    for program in selected:
        log.info("%s: compiling %s", target.name, program.name)
        results.append(figures.compile_figures(program, target, calibration, cache))
    state = memory.state_bytes(config, shape, learner, mesh)
    extra = {"load": {f"new {memory.ENGINE}": state[memory.ENGINE]}}
    if config.objective.kl_coef and config.objective.reference == "host":
        extra["score"] = {memory.REFERENCE: memory.reference_bytes(config, learner)}
    footprints = [f.footprint(program) for f, program in zip(results, selected, strict=True)]
    return Plan(
        target=target,
        model=model,
        calibration=calibration,
        programs=results,
        phases=memory.phases(state, footprints, target.chip.memory, extra),
        lanes=config.rollout.lanes,
        lane_bytes=memory.lane_bytes(config, shape, mesh.shape["tensor"]),
        tensor=mesh.shape["tensor"],
        crosses_hosts=programs.tensor_groups_cross_hosts(mesh),
    )


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _TOPOLOGY = flags.DEFINE_string(
        "topology", None, "target, such as v5p:2x2x2 or h100:1x8", required=True
    )
    _MODEL = flags.DEFINE_string("model", None, "name or HF directory of the policy")
    _PROGRAMS = flags.DEFINE_list("programs", [], "names of programs; all by default")
    _JSON = flags.DEFINE_bool("json", False, "print JSON")
    _CACHE = flags.DEFINE_string("cache", None, "directory of cached figures")
    cli.run(main)
