"""Predict memory and time of a run on absent accelerators, by compiling its programs.

    mmsr1 plan --config=FILE --topology=v5p:2x2x2 [--model=NAME|DIR] [--programs=decode,..] \\
        [--json] [--cache=DIR]

The target is a TPU slice (v5e, v5p or v6e and its shape) or GPUs (h100:1x8, h200:4x8: hosts x
GPUs). Its compiler is installed by the extra `tpu` or `cuda`; no device is needed. The model is one
of the released ones, such as qwen2.5-vl-7b, or a directory, of which only `config.json` is read;
without --model it is `config.run.model`. An engine has the first `mesh.tensor` devices.

Prints what each program holds, moves and computes beside what it needs, a lower bound and an
estimate of its time; then the memory of each phase of a step with a verdict, and the setting to
change if it does not fit. A phase has no verdict if --programs leaves out one of its programs.
Figures are cached in DIR, so that an interrupted plan resumes.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.apps.plan import engine, figures, memory, programs, report, targets
from mmsr1_jax.apps.plan.programs import Program
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
      names: Names of programs, or their first words; the usual ones if empty.
      directory: Directory of cached figures.

    Raises:
      UserError: A name is unknown, the mesh does not match the target, or its compiler is missing.
    """
    shape = programs.model_config(model)
    target = targets.make_target(topology)
    mesh = programs.make_mesh(config, target)
    learner = programs.make_learner(config, shape, mesh)
    tensor = mesh.shape["tensor"]
    rollout = engine.make_engine(config, shape, target.devices, tensor)
    all_programs = [
        *engine.engine_programs(config, shape, mesh, rollout),
        *programs.trainer_programs(config, shape, mesh, learner),
    ]
    selected = select(all_programs, names)
    run = {"config": dataclasses.asdict(config), "model": dataclasses.asdict(shape)}
    cache = figures.FigureCache(directory, target, run)
    calibration = figures.calibrate(target, cache)
    results = []
    for program in selected:
        log.info("%s: compiling %s", target.name, program.name)
        results.append(figures.compile_figures(program, target, calibration, cache))
    state = memory.state_bytes(config, learner, rollout)
    compiled = [f.name for f in results if not f.problem]
    extra = memory.phase_extras(config, learner, state, compiled)
    footprints = [f.footprint(program) for f, program in zip(results, selected, strict=True)]
    missing = {p.phase for p in select(all_programs, []) if p not in selected}
    return Plan(
        target=target,
        model=model,
        calibration=calibration,
        programs=results,
        phases=memory.phases(
            state, footprints, target.chip.memory, extra, memory.absent_state(config), missing
        ),
        cache=memory.cache_size(config, rollout),
        filled=engine.filled_tokens(config),
        tensor=tensor,
        crosses_hosts=programs.tensor_groups_cross_hosts(mesh),
        lockstep=rollout.num_engines > 1,
    )


def select(all_programs: Sequence[Program], names: Sequence[str]) -> list[Program]:
    """Return the programs with the given names, or first words of names; without any, the usual.

    Raises:
      UserError: No program has a name.
    """
    known = [program.name for program in all_programs]
    for name in names:
        if name not in known and name not in {word.partition(" ")[0] for word in known}:
            raise UserError(f"--programs={name}: this run has {', '.join(known)}")
    if not names:
        names = engine.usual_programs(known)
    return [p for p in all_programs if p.name in names or p.name.partition(" ")[0] in names]


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _TOPOLOGY = flags.DEFINE_string(
        "topology", None, "target, such as v5p:2x2x2 or h100:1x8", required=True
    )
    _MODEL = flags.DEFINE_string("model", None, "name or HF directory of the policy")
    _PROGRAMS = flags.DEFINE_list(
        "programs", [], "names of programs, or first words of names, such as decode,extend"
    )
    _JSON = flags.DEFINE_bool("json", False, "print JSON")
    _CACHE = flags.DEFINE_string("cache", None, "directory of cached figures")
    cli.run(main)
