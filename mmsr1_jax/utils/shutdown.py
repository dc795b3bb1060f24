"""Bounded shutdown of a command, after Ctrl-C or at normal exit, even if threads hang.

A hanging tool occupies a thread that Python cannot stop, and at exit the interpreter waits for the
threads of every `ThreadPoolExecutor`. Only this module ends the process while such threads are
running. That is as safe as SIGKILL, after which every command can resume.
"""

import atexit
import concurrent.futures.thread  # noqa: F401  its exit hook has to be older than ours
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
_UNWIND = 2.0  # seconds after Ctrl-C until the process is forced to exit
_JOIN = 3.0  # seconds that threads may take to end at exit


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
        while caught := os.read(reader, 64):  # signal numbers, written by Python's C handler
            for _ in range(caught.count(signal.SIGINT)):
                if timer is not None:
                    _end(code)
                timer = threading.Timer(_UNWIND, _end, (code,))
                timer.daemon = True
                timer.start()
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


_said = threading.Event()


def _say_interrupted(left: Iterable[pathlib.Path]) -> None:
    if _said.is_set():
        return
    _said.set()
    places = ", ".join(map(str, [*outputs.held(), *left]))
    more = f"; the same command resumes {places} from what is saved" if places else ""
    with contextlib.suppress(Exception):
        print(f"\ninterrupted{more}", file=sys.stderr)


def _end(code: int, left: Iterable[pathlib.Path] = ()) -> None:
    """End the process. `left` are directories whose locks the command has already released."""
    _say_interrupted(left)
    _leave(code)


def _leave(code: int) -> None:
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
        if not joined.wait(_JOIN):
            _leave(code)

    threading.Thread(target=watch, name="exit", daemon=True).start()
