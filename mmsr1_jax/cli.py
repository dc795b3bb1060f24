"""Command-line program `mmsr1`, and the flags of its commands.

    mmsr1 COMMAND [--config=FILE] [--config.field=value ..] ..

runs `python -m mmsr1_jax.COMMAND ..` from any directory. FILE is a Python file with `get_config()`,
or the name of one in `configs/`, such as `tiny` or `qwen7b:script`.
"""

import ast
import dataclasses
import os
import pathlib
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from mmsr1_jax.config import ConfigError, settings
from mmsr1_jax.config.errors import REFUSED, UserError, exit_code
from mmsr1_jax.utils import logs, process_watch, processes, shutdown

COMMANDS = (
    "train", "sft", "evaluate", "infer", "score", "construct", "curate", "report", "serve",
)  # fmt: skip
SCRIPTS = (
    "index", "merge", "cache", "settings", "plan", "reward", "random_policy", "tiny_world", "demo",
)  # fmt: skip
DEFAULT_CONFIG = pathlib.Path(settings.__file__)  # used without --config
_PACKAGE = pathlib.Path(__file__).parent
# In an installed package, and in a checkout.
_CONFIG_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def main() -> None:
    """Run the command that the program's first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return
    if name not in (*COMMANDS, *SCRIPTS):
        _exit_with(f"mmsr1 has no command {name!r}; `mmsr1 --help` lists them", REFUSED)
    sys.argv[:2] = [f"mmsr1 {name}"]
    runpy.run_module(_module_name(name), run_name="__main__", alter_sys=True)


def _module_name(name: str) -> str:
    return f"mmsr1_jax.{name}" if name in COMMANDS else f"mmsr1_jax.scripts.{name}"


def _help() -> str:
    """Return the list of commands with their summary lines, without importing any of them."""
    lines = ["usage: mmsr1 COMMAND [--config=FILE] [--config.field=value ..]", ""]
    for name in (*COMMANDS, *SCRIPTS):
        file = _PACKAGE.parent / (_module_name(name).replace(".", "/") + ".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"  {name:14} {summary}")
    lines += [
        "",
        "`mmsr1 COMMAND --help` lists the flags of a command, `mmsr1 settings` all settings.",
    ]
    return "\n".join(lines)


def config_file(name: str) -> str:
    """Resolve `--config`, a path or a name in `configs/`, to a file with its variant."""
    stem, colon, variant = name.partition(":")
    if stem.isidentifier() and not pathlib.Path(stem).is_file():
        for folder in _CONFIG_FOLDERS:
            if (folder / f"{stem}.py").is_file():
                return f"{folder / stem}.py{colon}{variant}"
    return name


def define_flag() -> flags.FlagHolder:
    """Define the flags `--config=FILE` and `--config.field=value`. Call it before `run`."""
    return config_flags.DEFINE_config_file("config", None, "a file with get_config(); see configs/")


def define_process_flags() -> Callable[[settings.Config], None]:
    """Define the flags of a command that runs on several hosts. Call it before `run`.

    Returns:
      A function that joins the processes, to be called before anything touches a device.
    """
    coordinator = flags.DEFINE_string(
        "coordinator", os.environ.get("MMSR1_COORDINATOR"),
        "HOST:PORT of process 0, of a run on several hosts; default: detected on TPU slices and "
        "under SLURM",
    )  # fmt: skip
    count = flags.DEFINE_integer(
        "num_processes", _integer("MMSR1_NUM_PROCESSES"), "number of processes, one a host"
    )
    index = flags.DEFINE_integer(
        "process_id", _integer("MMSR1_PROCESS_ID"), "index of this process, from 0"
    )

    def start(config: settings.Config) -> None:
        limits = config.processes
        processes.start(
            coordinator=coordinator.value, count=count.value, index=index.value,
            start_seconds=limits.start_seconds, timeout=limits.timeout_seconds,
            heartbeat_seconds=limits.heartbeat_seconds,
        )  # fmt: skip

    return start


def _integer(variable: str) -> int | None:
    """Return the integer of an environment variable, if it is set."""
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        _exit_with(f"{variable}={text} must be a number", REFUSED)
    return int(text) if text else None


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    max_arguments: int = 0,
    interrupted: int = shutdown.INTERRUPTED,
) -> None:
    """Run `main` like `absl.app.run`. Does not return.

    A `UserError`, an invalid flag, or a file that the system cannot open ends the program with one
    line and the exit code of `errors.exit_code`; so does Ctrl-C, with the exit code `interrupted`
    (see `shutdown.guard`). Any other exception keeps its traceback, with exit code 1.

    Args:
      main: Function of the program's name and its positional arguments. Its result is the exit
        code.
      max_arguments: Maximum number of positional arguments.
      interrupted: Exit code after Ctrl-C.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return _parse_flags(argv, max_arguments)
        except (flags.Error, ConfigError, OSError, *_CONFIG_FILE_ERRORS) as error:
            _exit_with(_one_line(error), REFUSED)

    def call(argv: Sequence[str]) -> int | None:
        logs.set_up()  # after absl has parsed its flags, which set a level of their own
        try:
            code = main(argv)
            processes.finish()
            return code
        except UserError as error:
            process_watch.guard_failure(error)
            _exit_with(error, exit_code(error))
        except OSError as error:
            if processes.count() > 1:
                traceback.print_exc()
                process_watch.guard_failure(error)
            if error.filename is None:  # not about a file, so not the user's to fix
                raise
            _exit_with(error, exit_code(error))
        except SystemExit as error:
            if error.code and processes.count() > 1:
                process_watch.guard_failure(error)
            raise
        except BaseException as error:
            if processes.count() > 1:
                if not isinstance(error, KeyboardInterrupt):
                    traceback.print_exc()
                process_watch.guard_failure(error)
            raise

    app.run(shutdown.guard(call, interrupted=interrupted), flags_parser=parse)


def _exit_with(message: object, code: int) -> NoReturn:
    """End the program with one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse_flags(argv: Sequence[str], max_arguments: int) -> list[str]:
    """Parse the flags and check the settings. Return the program's name and other arguments."""
    if "config" in flags.FLAGS:
        names = [a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-")]
        for name in names:
            if name.startswith("config."):
                _check_field(name)
        if "config" not in names:
            argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
        # The file must be parsed before the flags that override its fields.
        files = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
        resolved = [f"--config={config_file(a.partition('=')[2])}" for a in files]
        argv = [argv[0], *resolved, *(a for a in argv[1:] if a not in files)]
        sys.argv = argv  # ml_collections reads the overrides from here
    rest = flags.FLAGS(argv)
    if len(rest) > 1 + max_arguments:
        raise flags.Error(f"unexpected argument {rest[1 + max_arguments]!r}")
    if "config" in flags.FLAGS:
        flag = flags.FLAGS["config"]
        file = config_flags.get_config_filename(flag).split(":")[0]
        if not pathlib.Path(file).is_file():
            raise ConfigError(f"--config={file}: no such file")
        config = flag.value
        if not isinstance(config, settings.Config):
            raise ConfigError(f"--config={file}: get_config() must return a config.Config")
        settings.validate(config)
    return rest


def _check_field(name: str) -> None:
    """Raise ConfigError unless `name` (`config.part.field`) is a setting."""
    hint, parent = settings.Config, "config"
    for part in name.split(".")[1:]:
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in hints:
            raise ConfigError(f"{name}: {parent} has no field {part!r}, only {', '.join(hints)}")
        hint, parent = hints[part], f"{parent}.{part}"


# Exceptions from loading a config file or looking up a field in it.
_CONFIG_FILE_ERRORS = (AttributeError, KeyError, TypeError, ValueError, ImportError, SyntaxError)


def _one_line(error: BaseException) -> str:
    """Return the last line of an error message, as ml_collections puts tracebacks before it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
