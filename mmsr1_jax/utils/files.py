"""Files that a data set names: read only inside its folder, only if regular, only up to a size."""

import itertools
import os
import pathlib
import stat
from collections.abc import Iterable

MAX_PICTURE_BYTES = 100_000_000
_PIECE = 1 << 20  # bytes


class FileRefusedError(ValueError):
    """A file that a data set may not name; the message says which file, and why.

    Attributes:
      strerror: The reason alone.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{path}: {reason}")
        self.strerror = reason


def inside(
    name: str | os.PathLike,
    folder: str | os.PathLike,
    roots: Iterable[str | os.PathLike] = (),
    *,
    allow: str = "config.data.image_roots",
) -> pathlib.Path:
    """Return the resolved path of a file or directory that a data set in `folder` names.

    Args:
      name: path from `folder`; absolute paths and `..` are resolved, then checked.
      folder: directory of the file that holds the name.
      roots: other directories in which the path may lie.
      allow: setting or flag named in the error that allows more directories.

    Raises:
      FileRefusedError: the path, after resolving symbolic links, lies in none of the directories,
        nothing is there, or it is neither a regular file nor a directory.
    """
    path = pathlib.Path(folder, name)
    try:
        real = pathlib.Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(root)) for root in (folder, *roots)):
            raise FileRefusedError(
                path, f"outside of {folder}, the folder of the data; {allow} allows other folders"
            )
        mode = real.stat().st_mode
    except FileRefusedError:
        raise
    except FileNotFoundError:
        raise FileRefusedError(path, "no such file") from None
    except (OSError, ValueError) as error:  # too long, a loop of links, a null character
        raise FileRefusedError(path, getattr(error, "strerror", None) or str(error)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileRefusedError(path, "not a regular file")
    return real


def check_regular(path: str | os.PathLike, *, max_bytes: int = MAX_PICTURE_BYTES) -> None:
    """Raise FileRefusedError unless `path` is a regular file of at most `max_bytes`."""
    os.close(_open_regular(path, max_bytes))


def read_regular(path: str | os.PathLike, *, max_bytes: int = MAX_PICTURE_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
      FileRefusedError: not a regular file (a device, a pipe, a directory), larger than `max_bytes`,
        or unreadable.
    """
    with open(_open_regular(path, max_bytes), "rb") as file:
        # A file of /proc has the size 0, a growing one any; in pieces, as a read takes memory for
        # all that it asks for.
        pieces = iter(lambda: file.read(_PIECE), b"")
        data = b"".join(itertools.islice(pieces, max_bytes // _PIECE + 2))
    if len(data) > max_bytes:
        raise FileRefusedError(path, f"larger than {max_bytes} bytes")
    return data


def _open_regular(path: str | os.PathLike, max_bytes: int) -> int:
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise FileRefusedError(path, getattr(error, "strerror", None) or str(error)) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= max_bytes:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise FileRefusedError(path, f"{found.st_size} bytes are more than {max_bytes}")
    raise FileRefusedError(path, "not a regular file")
