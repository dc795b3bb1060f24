"""Safe access to files that a data set names: regular, of bounded size, in allowed folders."""

import itertools
import os
import pathlib
import stat
from collections.abc import Iterable

from mmsr1_jax.config.errors import UserError

MAX_IMAGE_BYTES = 100_000_000
_CHUNK = 1 << 20  # bytes
_NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "ceph", "glusterfs", "beegfs", "afs",
    "fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.glusterfs", "fuse.juicefs", "fuse.ceph",
)  # fmt: skip


class FileRefusedError(UserError):
    """A file that a data set may not access; the message names the file and the reason.

    Attributes:
      strerror: Reason, without the file name.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{path}: {reason}")
        self.strerror = reason


def network_file_system(
    path: str | os.PathLike, mounts: pathlib.Path = pathlib.Path("/proc/self/mounts")
) -> str | None:
    """Return the type of the network file system that holds a path, such as `nfs4`, or None.

    Args:
      path: A path, which need not exist.
      mounts: Table of mounts, as Linux has it. Without one, no type is known.
    """
    target, found = pathlib.Path(os.path.realpath(path)), (-1, "")
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = pathlib.Path(fields[1].replace("\\040", " ").replace("\\134", "\\"))
        if point in (target, *target.parents) and len(point.parts) >= found[0]:
            found = len(point.parts), fields[2]  # of two at the same point, the later one
    return found[1] if found[1] in _NETWORK_FILE_SYSTEMS else None


def resolve_inside(
    name: str | os.PathLike,
    folder: str | os.PathLike,
    roots: Iterable[str | os.PathLike] = (),
    *,
    allow: str = "config.data.image_roots",
) -> pathlib.Path:
    """Return the resolved path of a file or directory that a data set in `folder` names.

    Args:
      name: Path relative to `folder`. Absolute paths and `..` are resolved, then checked.
      folder: Directory of the file that contains the name.
      roots: Additional directories that may contain the path.
      allow: Setting or flag that allows more directories, named in the error.

    Raises:
      FileRefusedError: After resolving symbolic links, the path is in none of the directories, does
        not exist, or is neither a regular file nor a directory.
    """
    path = pathlib.Path(folder, name)
    try:
        real = pathlib.Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(root)) for root in (folder, *roots)):
            raise FileRefusedError(
                path, f"outside of {folder}, the folder of the data; add its folder to {allow}"
            )
        mode = real.stat().st_mode
    except FileRefusedError:
        raise
    except FileNotFoundError:
        raise FileRefusedError(path, "no such file") from None
    except (OSError, ValueError) as error:  # too long, a loop of symbolic links, a NUL character
        raise FileRefusedError(path, getattr(error, "strerror", None) or str(error)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileRefusedError(path, "not a regular file")
    return real


def check_regular(path: str | os.PathLike, *, max_bytes: int = MAX_IMAGE_BYTES) -> None:
    """Raise FileRefusedError unless `path` is a regular file of at most `max_bytes`."""
    os.close(_open_regular(path, max_bytes))


def read_regular(path: str | os.PathLike, *, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
      FileRefusedError: The file is not regular (such as a device, a pipe or a directory), larger
        than `max_bytes`, or unreadable.
    """
    with open(_open_regular(path, max_bytes), "rb") as file:
        # The size is not reliable: files in /proc report 0, and a file may grow. Reading in chunks
        # bounds the memory, as a read allocates all of the bytes that it requests.
        chunks = iter(lambda: file.read(_CHUNK), b"")
        data = b"".join(itertools.islice(chunks, max_bytes // _CHUNK + 2))
    if len(data) > max_bytes:
        raise FileRefusedError(path, f"larger than {max_bytes} bytes")
    return data


def _open_regular(path: str | os.PathLike, max_bytes: int) -> int:
    try:
        # Without O_NONBLOCK, opening a pipe without a writer would block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise FileRefusedError(path, getattr(error, "strerror", None) or str(error)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise FileRefusedError(path, f"{status.st_size} bytes are more than {max_bytes}")
    raise FileRefusedError(path, "not a regular file")
