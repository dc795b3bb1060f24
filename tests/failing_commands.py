"""Run every command with an exception in a function that it calls.

    python -m tests.failing_commands FOLDER

Writes FOLDER/results.json: `{"COMMAND/EXCEPTION": [exit code, stderr], ..}`. The commands are
imported once and run in forked processes, as importing JAX takes seconds.
"""

import gc
import importlib
import json
import os
import pathlib
import runpy
import sys
import warnings
from collections.abc import Sequence

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError

EXCEPTIONS: dict[str, Exception] = {
    "ValueError": ValueError("injected"),
    "UserError": UserError("injected"),
}
# A function that each command calls, and the command's arguments. `{}` is an empty folder, and
# `{file}` an empty file.
CALLS: dict[str, tuple[str, Sequence[str]]] = {
    "train": ("mmsr1_jax.utils.outputs:lock", ("--workdir={}/run", "--config=tiny")),
    "sft": ("mmsr1_jax.utils.outputs:lock", ("--workdir={}/run", "--config=tiny:warm_start")),
    "evaluate": ("mmsr1_jax.utils.outputs:lock", ("--model={}", "--out={}/out")),
    "infer": ("mmsr1_jax.rollout.build:make_engine", ("--model={}", "--question=Why?")),
    "score": (
        "mmsr1_jax.processing.processor:Processor.from_directory",
        ("--model={}", "--conversations={file}", "--out={}/out.jsonl"),
    ),
    "curate": ("mmsr1_jax.utils.outputs:lock", ("--model={}", "--out={}/out")),
    "construct": ("mmsr1_jax.utils.outputs:lock", ("--out={}/out",)),
    "report": ("mmsr1_jax.apps.report.reader:read", ("{}", "--out={}/report.html")),
    "serve": ("mmsr1_jax.rollout.build:make_engine", ("--model={}", "--port=0")),
    "index": ("mmsr1_jax.tools.index_builder:build_index", ("--pages={file}", "--out={}/index")),
    "merge": (
        "mmsr1_jax.models.families:read_config",
        ("--model={}", "--adapter={}", "--out={}/out"),
    ),
    "cache": ("mmsr1_jax.tools.redis_cache:open_cache", ("info", "{file}")),
    "settings": ("inspect:getdoc", ()),
    "plan": (
        "mmsr1_jax.apps.plan.targets:make_target", ("--config=tiny", "--topology=v5p:2x2x2"),
    ),
    "reward": (
        "mmsr1_jax.utils.outputs:new_file", ("--episodes={file}", "--out={}/out.jsonl"),
    ),
    "random_policy": (
        "mmsr1_jax.models.checkpoint:check_replaceable", ("--out={}/policy",),
    ),
    "tiny_world": ("mmsr1_jax.utils.outputs:lock", ("--out={}/world",)),
    "demo": ("mmsr1_jax.evaluation.records:scan", ("--before={}", "--after={}")),
}  # fmt: skip


def module_name(command: str) -> str:
    folder = "mmsr1_jax" if command in cli.COMMANDS else "mmsr1_jax.scripts"
    return f"{folder}.{command}"


def run_failing(command: str, exception: Exception, folder: pathlib.Path) -> None:
    """Run a command in this process, with a function that raises an exception."""
    function, arguments = CALLS[command]
    module, _, path = function.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)

    def fail(*args: object, **kwargs: object) -> None:
        raise exception

    setattr(owner, name, fail)
    file = folder / "empty"
    file.touch()
    values = [argument.replace("{file}", str(file)) for argument in arguments]
    sys.argv = [command, *(value.replace("{}", str(folder)) for value in values)]
    runpy.run_module(module_name(command), run_name="__main__", alter_sys=True)


def main() -> None:
    warnings.simplefilter("ignore")
    base = pathlib.Path(sys.argv[1])
    results: dict[str, tuple[int, str]] = {}
    for command in CALLS:
        importlib.import_module(module_name(command))
    gc.freeze()  # otherwise every process would copy and collect all imported objects
    for command in CALLS:
        for name, exception in EXCEPTIONS.items():
            folder = base / f"{command}-{name}"
            folder.mkdir()
            log = base / f"{command}-{name}.txt"
            child = os.fork()
            if child == 0:  # ends like the command: with its traceback and exit code
                descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
                os.dup2(descriptor, 2)
                os.dup2(descriptor, 1)
                run_failing(command, exception, folder)
                sys.exit(0)
            _, status = os.waitpid(child, 0)
            results[f"{command}/{name}"] = os.waitstatus_to_exitcode(status), log.read_text()
    (base / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
