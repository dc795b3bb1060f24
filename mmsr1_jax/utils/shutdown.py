"""How a command ends: soon after Ctrl-C, and soon after its work, whatever its threads still do.

A tool that hangs holds a thread that Python can neither stop nor leave: at exit the interpreter
waits for the threads of every `ThreadPoolExecutor`. Here, and nowhere else, the process is ended
with such threads in it. That is as safe as SIGKILL, which every command survives.
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

INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells have it
_UNWIND = 2.0  # seconds after Ctrl-C until the process is ended by force
_JOIN = 3.0  # seconds at exit for threads to end


def guard(
    main: Callable[[Sequence[str]], int | None], *, interrupted: int = INTERRUPTED
) -> Callable[[Sequence[str]], int | None]:
    """Wrap a command's `main` to bound how long Ctrl-C and exit take.

    Ctrl-C raises KeyboardInterrupt in `main`, which ends the process with one line and the exit
    code `interrupted`; by force, if that takes more than 2 s, or at the second Ctrl-C. After `main`
    threads have 3 s to end.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        code: int | None = 1
        try:
            with _watching(interrupted):
                code = main(argv)
                return code
        except KeyboardInterrupt as interrupt:
            # Not through the end of the interpreter, which native threads at work may crash.
            _end(interrupted, getattr(interrupt, "interrupted", ()))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        finally:
            _bound_exit(code or 0)

    return guarded


@contextlib.contextmanager
def _watching(code: int) -> Iterator[None]:
    """Within it, the process ends at most 2 s after Ctrl-C, even while the main thread computes."""
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
    """End the process; `left` are directories that the interrupted command has let go already."""
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
    """Let the interpreter wait for threads for 3 s at most. What is registered with `atexit` runs
    after that wait, and takes the time it needs."""
    joined = threading.Event()
    atexit.register(joined.set)

    def watch() -> None:
        if not joined.wait(_JOIN):
            _leave(code)

    threading.Thread(target=watch, name="exit", daemon=True).start()
