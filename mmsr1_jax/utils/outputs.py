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
import sys
from collections.abc import Iterator

from mmsr1_jax.config.errors import UserError

# No other program uses these names, so such files may be removed.
_LEFT_OVER = re.compile(r"\.(.+)\.mmsr1-(?:partial(?:-journal|-wal|-shm)?|old|lock)")
_HOLDER = re.compile(r"process \d+ on [\w.-]+")  # content of a lock file
_FOLDERS = ("", "episodes", "pictures")  # subfolders of a locked directory to clean up
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_held: list[pathlib.Path] = []


class LockedError(UserError):
    """Another process is writing the same output; the message names the output and the process."""


@contextlib.contextmanager
def lock(directory: str | os.PathLike) -> Iterator[None]:
    """Lock a directory against other commands until the block or the process ends.

    The directory is created if it does not exist, and leftovers of killed processes are removed. A
    KeyboardInterrupt that leaves the block lists the directory in its attribute `interrupted`.

    Raises:
      LockedError: Another process holds the lock.
      OSError: The directory cannot be created or written.
    """
    path = pathlib.Path(directory)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path / ".mmsr1-lock", path):
            for name in _FOLDERS:
                _sweep(path / name)
            _held.append(path)
            try:
                yield
            finally:
                _held.remove(path)
    except KeyboardInterrupt as interrupt:
        interrupt.interrupted = [*getattr(interrupt, "interrupted", ()), path]
        raise
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()  # succeeds only if nothing was written


def held() -> list[pathlib.Path]:
    """Return the directories that this process has locked."""
    return list(_held)


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
        raise NotADirectoryError(f"{target}: a file has this name; name another directory")


def _exchange(partial: pathlib.Path, target: pathlib.Path) -> None:
    _check_no_file(target)  # a file may have appeared in the meantime
    if not target.exists():
        partial.rename(target)
    elif not _swap(partial, target):
        print(f"{target}: this filesystem cannot exchange directories in one step; it is moved in "
              "two steps", file=sys.stderr)  # fmt: skip
        target.rename(_beside(target, "old"))
        try:
            partial.rename(target)
        finally:
            _recover(target)
    _sync(target.parent)


def _swap(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchange two names atomically. Return False if the system or filesystem cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    arguments = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(
            _AT_FDCWD, arguments[0], _AT_FDCWD, arguments[1], ctypes.c_uint(_RENAME_EXCHANGE)
        )
    elif hasattr(library, "renamex_np"):  # macOS
        failed = library.renamex_np(*arguments, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if failed and ctypes.get_errno() not in _NO_EXCHANGE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def _recover(target: pathlib.Path) -> None:
    """Complete an interrupted two-step exchange, or undo it if only the first step was made."""
    old = _beside(target, "old")
    if not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)
        print(f"{target}: restored; its replacement was interrupted", file=sys.stderr)


def _sweep(folder: pathlib.Path) -> None:
    """Remove leftovers of killed processes in a folder, but no files that a process is writing."""
    entries = list(os.scandir(folder)) if folder.is_dir() and not folder.is_symlink() else []
    for entry in entries:
        match = _LEFT_OVER.fullmatch(entry.name)
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
def _locked(path: pathlib.Path, what: pathlib.Path) -> Iterator[None]:
    """Hold a lock file, which names the process that holds it."""
    descriptor = _acquire(path, what)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held, see `_acquire`
        os.close(descriptor)


def _acquire(path: pathlib.Path, what: pathlib.Path) -> int:
    """Open and lock a file, and return its descriptor. Raise LockedError or OSError on failure."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, os.stat(path, follow_symlinks=False)):
                    return descriptor
            os.close(descriptor)  # its holder has just removed or renamed it
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 100, 0).decode("utf-8", "replace")
            os.close(descriptor)
            known = _HOLDER.fullmatch(holder)
            raise LockedError(
                f"{what}: in use by {holder if known else 'another process'}; wait until it has "
                "ended, or name another place"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"{what}: this filesystem has no locks; let no other process write there",
                  file=sys.stderr)  # fmt: skip
            return descriptor


def _sync(path: str | os.PathLike) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
