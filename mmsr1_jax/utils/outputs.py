"""Atomic output files and directories, with one writer at a time.

    lock(DIR)             DIR/.mmsr1-lock       while a command works in DIR
    new_file(PATH)        .NAME.mmsr1-partial   itself locked, renamed to PATH when complete
    new_directory(DIR)    .NAME.mmsr1-partial/  exchanged with DIR atomically, under the lock
                                                .NAME.mmsr1-lock

Locks are `flock`s, which the kernel releases when their process ends for any reason, so a lock is
never stale. The next `lock` of a directory removes the leftovers of killed processes, recognised by
these names. Files with other names are never removed or renamed.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator
from typing import TextIO

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import processes
from mmsr1_jax.utils.logs import log

# No other program uses these names, so such files may be removed.
_LEFTOVER = re.compile(r"\.(.+)\.mmsr1-(?:partial(?:-journal|-wal|-shm)?|old|lock)")
_HOLDER = re.compile(r"process \d+ on [\w.-]+")  # content of a lock file
_SUBFOLDERS = ("", "episodes", "images")  # subfolders of a locked directory to clean up
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_locked_directories: list[pathlib.Path] = []


class LockedError(UserError):
    """Another process is writing the same output; the message names the output and the process."""

    exit_code = 1  # a process that was killed may still hold the lock


@contextlib.contextmanager
def lock(directory: str | os.PathLike) -> Iterator[None]:
    """Lock a directory against other commands until the block or the process ends.

    The directory is created if it does not exist, and leftovers of killed processes are removed. A
    KeyboardInterrupt that leaves the block lists the directory in its attribute `interrupted`.

    With several processes, process 0 holds the lock, and the others wait until it does.

    Raises:
      LockedError: Another process holds the lock.
      OSError: The directory cannot be created or written.
    """
    if not processes.main():
        processes.barrier("lock")
        yield
        return
    path = pathlib.Path(directory)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path / ".mmsr1-lock", path):
            for name in _SUBFOLDERS:
                _sweep(path / name)
            processes.barrier("lock")
            _locked_directories.append(path)
            try:
                yield
            finally:
                _locked_directories.remove(path)
    except KeyboardInterrupt as interrupt:
        vars(interrupt)["interrupted"] = [*getattr(interrupt, "interrupted", ()), path]
        raise
    finally:
        if created:
            with contextlib.suppress(OSError):
                path.rmdir()  # succeeds only if nothing was written


def locked_directories() -> list[pathlib.Path]:
    """Return the directories that this process has locked."""
    return list(_locked_directories)


def truncate_partial_line(path: pathlib.Path) -> None:
    """Remove a truncated last line from a file. A missing file is ignored."""
    if path.is_file():
        with open(path, "rb+") as file:
            end = 0
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
            file.truncate(end)


def partial_path(path: str | os.PathLike) -> pathlib.Path:
    """Return the temporary path of `path` while it is being written."""
    return _beside(pathlib.Path(path), "partial")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield an empty file next to `path` that replaces it when the block ends without error.

    Raises:
      LockedError: Another process is writing `path`.
      OSError: The file cannot be written.
    """
    path = pathlib.Path(path)
    partial = partial_path(path)
    descriptor = _acquire(partial, path)
    try:
        os.ftruncate(descriptor, 0)
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_text_file(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[TextIO]:
    """Yield a UTF-8 text stream whose content replaces `path` like `new_file`.

    Args:
      path: File to write.
      errors: Handling of lone surrogates, as for `open`: `backslashreplace` writes them as the
        escape that JSON uses, `replace` as question marks.
    """
    with new_file(path) as partial, open(partial, "w", encoding="utf-8", errors=errors) as file:
        yield file


def write_text(path: str | os.PathLike, text: str, *, errors: str = "strict") -> None:
    """Replace a file by a text, encoded as UTF-8 (see `new_text_file`)."""
    with new_text_file(path, errors=errors) as file:
        file.write(text)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield an empty directory that replaces `directory` when the block ends without error.

    The previous content of `directory` is deleted. At any time, readers see either the old
    directory or the new one. The exception is a filesystem that cannot exchange two names (some
    NFS), where both are missing for a moment. A process killed at that moment leaves the old
    directory as `.NAME.mmsr1-old`, which the next `lock` of the parent or the next `new_directory`
    restores.

    Raises:
      LockedError: Another process is writing `directory`.
      NotADirectoryError: `directory` is a file, which is left unchanged.
      OSError: The directory cannot be written.
    """
    target = pathlib.Path(os.path.realpath(directory))
    _check_no_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    with _locked(_beside(target, "lock"), target):
        _recover(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(os.path.join(folder, name))
                _sync(folder)
            _exchange(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # the old one, or an incomplete new one


def _beside(target: pathlib.Path, kind: str) -> pathlib.Path:
    return target.with_name(f".{target.name}.mmsr1-{kind}")


def _check_no_file(target: pathlib.Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "a file, not a directory; choose another path", str(target)
        )


def _exchange(partial: pathlib.Path, target: pathlib.Path) -> None:
    _check_no_file(target)  # a file may have appeared in the meantime
    if not target.exists():
        partial.rename(target)
    elif not _swap(partial, target):
        log.warning(
            "%s: this filesystem cannot exchange two directories atomically; replacing the "
            "directory in two steps", target,
        )  # fmt: skip
        target.rename(_beside(target, "old"))
        try:
            partial.rename(target)
        finally:
            _recover(target)
    _sync(target.parent)


def _swap(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchange two names atomically. Return False if the system or filesystem cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    arguments = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(
            _AT_FDCWD, arguments[0], _AT_FDCWD, arguments[1], ctypes.c_uint(_RENAME_EXCHANGE)
        )
    elif hasattr(library, "renamex_np"):  # macOS
        failed = library.renamex_np(*arguments, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if failed and ctypes.get_errno() not in _NO_EXCHANGE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return not failed


def _recover(target: pathlib.Path) -> None:
    """Complete an interrupted two-step exchange, or undo it if only the first step was done."""
    old = _beside(target, "old")
    if not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)
        log.warning("%s: restored the old directory, as its replacement was interrupted", target)


def _sweep(folder: pathlib.Path) -> None:
    """Remove leftovers of killed processes in a folder, but no files that a process is writing."""
    entries = list(os.scandir(folder)) if folder.is_dir() and not folder.is_symlink() else []
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        path = folder / entry.name
        with contextlib.suppress(LockedError):
            if entry.is_file():
                descriptor = _acquire(path, path)
                path.unlink(missing_ok=True)
                os.close(descriptor)
            elif entry.is_dir():
                target = folder / match[1]
                with _locked(_beside(target, "lock"), target):
                    _recover(target)
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path, output: pathlib.Path) -> Iterator[None]:
    """Hold a lock file, which names the process that holds it."""
    descriptor = _acquire(path, output)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held, see `_acquire`
        os.close(descriptor)


def _acquire(path: pathlib.Path, output: pathlib.Path) -> int:
    """Open and lock a file, and return its descriptor. Errors name `output`, which it protects.

    Raises:
      LockedError: Another process holds the lock.
      OSError: The file cannot be created or locked.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(status, os.stat(path, follow_symlinks=False)):
                    return descriptor
            os.close(descriptor)  # its holder has just removed or renamed it
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 100, 0).decode("utf-8", "replace")
            os.close(descriptor)
            if not _HOLDER.fullmatch(holder):
                holder = "another process"
            raise LockedError(
                f"{output}: in use by {holder}; wait until it has ended, or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning(
                "%s: this filesystem does not support locks; make sure that no other process "
                "writes this output", output,
            )  # fmt: skip
            return descriptor


def _sync(path: str | os.PathLike) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
