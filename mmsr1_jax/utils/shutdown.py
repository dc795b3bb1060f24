"""Bounded shutdown of a command, after Ctrl-C or at normal exit, even if threads hang.

A hanging tool occupies a thread that Python cannot stop, and at exit the interpreter waits for the
threads of every `ThreadPoolExecutor`. Only this module ends the process while such threads are
running. That is as safe as SIGKILL, after which every command can resume.
"""

import atexit
import concurrent.futures.thread  # noqa: F401  its exit hook must be registered before ours
import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from mmsr1_jax.utils import outputs

INTERRUPTED = 128 + signal.SIGINT  # exit code by the convention of shells
_UNWIND_TIMEOUT = 2.0  # seconds after Ctrl-C until the process is forced to exit
_JOIN_TIMEOUT = 3.0  # seconds that threads may take to end at exit


def guard(
    main: Callable[[Sequence[str]], int | None], *, interrupted: int = INTERRUPTED
) -> Callable[[Sequence[str]], int | None]:
    """Wrap a command's `main` to bound how long Ctrl-C and exit take.

    Ctrl-C raises KeyboardInterrupt in `main`, which ends the process with a one-line message and
    the exit code `interrupted`. If that takes more than 2 s, or at a second Ctrl-C, the process is
    forced to exit. After `main` returns, threads have 3 s to end.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        code: int | None = 1
        try:
            with _watching(interrupted):
                code = main(argv)
                return code
        except KeyboardInterrupt as interrupt:
            # Skip the interpreter's finalisation, which running native threads may crash.
            _end(interrupted, getattr(interrupt, "interrupted", ()))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        finally:
            _bound_exit(code or 0)

    return guarded


@contextlib.contextmanager
def _watching(code: int) -> Iterator[None]:
    """End the process at most 2 s after Ctrl-C in the block, even if the main thread is busy."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        timer = None
        while signals := os.read(reader, 64):  # signal numbers, written by Python's C handler
            for _ in range(signals.count(signal.SIGINT)):
                if timer is not None:
                    _end(code)
                timer = threading.Timer(_UNWIND_TIMEOUT, _end, (code,))
                timer.daemon = True
                timer.start()
        os.close(reader)

    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)


_reported = threading.Event()


def _report_interrupt(released: Iterable[pathlib.Path]) -> None:
    if _reported.is_set():
        return
    _reported.set()
    directories = ", ".join(map(str, [*outputs.locked_directories(), *released]))
    hint = f"; the same command resumes {directories} from its saved state" if directories else ""
    with contextlib.suppress(Exception):
        # Not logged: a thread that hangs may hold the lock of a log handler.
        print(f"\ninterrupted{hint}", file=sys.stderr)


def _end(code: int, released: Iterable[pathlib.Path] = ()) -> None:
    """End the process after Ctrl-C.

    Args:
      code: Exit code.
      released: Directories of the command whose locks have already been released.
    """
    _report_interrupt(released)
    _exit_now(code)


def _exit_now(code: int) -> None:
    """End the process without finalisation, after killing its child processes."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _bound_exit(code: int) -> None:
    """Bound the time that the interpreter waits for threads at exit to 3 s.

    Functions registered with `atexit` run after that wait, without a time limit.
    """
    joined = threading.Event()
    atexit.register(joined.set)

    def watch() -> None:
        if not joined.wait(_JOIN_TIMEOUT):
            _exit_now(code)

    threading.Thread(target=watch, name="exit", daemon=True).start()
