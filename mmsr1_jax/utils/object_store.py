"""A directory in an object store whose files are those of a local folder: `gs://BUCKET/FOLDER`.

    store = ObjectStore("gs://BUCKET/RUN", folder)
    store.claim(owner)                  # process 0; all then `check_owner(owner)`
    store.pull("config.json", "images") # into the folder, unless they are there
    store.push()                        # what is new in the folder, or has changed

A command works in the folder, which may be lost at any time, and pushes it after each step. Hidden
files (locks, unfinished files), `checkpoints/` and `wandb/` are not pushed. Object stores have no
locks: the object `.mmsr1-owner` names the command that writes there. Another one takes over by
replacing it, and the first ends at its next push, before it overwrites anything.

gcsfs transfers the files, and retries requests that fail for a moment.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from jax.errors import JaxRuntimeError

from mmsr1_jax.config.errors import REFUSED, UserError
from mmsr1_jax.utils.logs import log

_OWNER = ".mmsr1-owner"
_NOT_PUSHED = ("checkpoints", "wandb")  # Orbax and wandb transfer theirs themselves


class StoreError(UserError):
    """A request to an object store failed; the same command may succeed later."""

    exit_code = 1


class StoreRefusedError(StoreError):
    """A bucket or object does not exist, or another command has taken over the directory."""

    exit_code = REFUSED


def is_address(path: str | os.PathLike) -> bool:
    """Return whether a path is an address of an object store, and not a path on a disk."""
    return "://" in str(path)


def local_folder(address: str, process: int) -> pathlib.Path:
    """Return the user's local folder for an address; each process of a run has its own.

    Its name is that of the run, the last part of the address.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    name = address.rstrip("/").rpartition("/")[2]
    return pathlib.Path(root, "mmsr1_jax", "runs", digest, str(process), name)


@contextlib.contextmanager
def reported(address: str) -> Iterator[None]:
    """Raise StoreError, in one line with the address, for any error of a request in the block."""
    try:
        yield
    except (UserError, JaxRuntimeError):  # the latter of another process that has failed
        raise
    except Exception as error:  # of gcsfs, google.auth, aiohttp, Orbax, tensorstore, ..
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        kind = StoreRefusedError if isinstance(error, FileNotFoundError) else StoreError
        raise kind(
            f"{address}: a request to the object store failed: {reason}. Check that the bucket "
            "exists, and that this machine's Google credentials may list, read, write and delete "
            "its objects"
        ) from error


class ObjectStore:
    """A directory in an object store, and the local folder whose files are pushed to it.

    Args:
      address: `gs://BUCKET/FOLDER`.
      folder: Local folder, created if it does not exist. Its files are removed, since another
        machine may have written newer ones to the store.

    Raises:
      UserError: The address is invalid, or gcsfs is not installed.
      StoreError: The credentials of this machine cannot be read.
    """

    def __init__(self, address: str, folder: pathlib.Path):
        self.address, self.folder = address.rstrip("/"), folder
        scheme, _, path = self.address.partition("://")
        if scheme != "gs" or not all(path.split("/")) or "/" not in path:
            raise UserError(
                f"{address}: must be gs://BUCKET/FOLDER; other stores are not supported"
            )
        try:
            import fsspec
            import gcsfs  # noqa: F401
        except ImportError as error:
            raise UserError(f'{address}: needs gcsfs ({error}): pip install ".[gcs]"') from None
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs, too
        logging.getLogger("fsspec").setLevel(logging.WARNING)
        with reported(self.address):
            self._files = fsspec.filesystem("gcs", use_listings_cache=False)
        self._owner = ""
        self._pushed: dict[str, tuple[int, int]] = {}  # name -> time of change, size
        _empty(folder)

    def claim(self, owner: str) -> None:
        """Make `owner` the command that may push. Another one that still runs ends by that."""
        data = json.dumps({"owner": owner, "host": os.uname().nodename, "process": os.getpid()})
        if former := self._read_owner():
            log.warning(
                "%s: taking over from process %s on %s; should it still run, it ends after its "
                "current step", self.address, former.get("process"), former.get("host"),
            )  # fmt: skip
        with reported(self.address):
            self._files.pipe_file(f"{self.address}/{_OWNER}", data.encode())
        self._owner = owner

    def check_owner(self, owner: str | None = None) -> None:
        """Check that the owner is still that of `claim`, or `owner` from now on.

        Raises:
          StoreRefusedError: Another command has taken over.
          StoreError: The request failed.
        """
        self._owner = self._owner if owner is None else owner
        present = self._read_owner()
        if present.get("owner") != self._owner:
            where = f"process {present.get('process')} on {present.get('host')} has taken over"
            raise StoreRefusedError(
                f"{self.address}: {where if present else f'{_OWNER} was removed'}; this command "
                "ends, without overwriting anything. One command at a time may write there"
            )

    def push(self, *names: str) -> None:
        """Copy files of the folder to the store, after `check_owner`.

        Args:
          *names: Relative paths of files. Without any: all files that are new or have changed
            since they were last pushed or pulled.

        Raises:
          StoreRefusedError: Another command has taken over.
          StoreError: A request failed.
        """
        self.check_owner()
        found = {name: _state(self.folder / name) for name in names or _file_names(self.folder)}
        changed = {name: state for name, state in found.items() if names or self._differs(name)}
        if changed:
            with reported(self.address):
                self._files.put(
                    [str(self.folder / name) for name in changed],
                    [f"{self.address}/{name}" for name in changed],
                )
            self._pushed |= changed  # a file that changed meanwhile is pushed again

    def pull(self, *names: str) -> None:
        """Copy files, or all files of folders, from the store unless they are in the local folder.

        Names that the store does not have are skipped.

        Raises:
          StoreError: A request failed.
        """
        missing: dict[str, str] = {}
        with reported(self.address):
            root = self.address.partition("://")[2]
            for name in names:
                for path in self._files.find(f"{root}/{name}"):
                    relative = path.removeprefix(f"{root}/")
                    if ".." not in relative.split("/") and not (self.folder / relative).exists():
                        missing[relative] = path
            for name in missing:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            if missing:
                self._files.get([*missing.values()], [str(self.folder / name) for name in missing])
        self._pushed |= {name: _state(self.folder / name) for name in missing}

    def holds(self, name: str) -> bool:
        """Return whether the store has a file, or files in a folder, of this name."""
        with reported(self.address):
            return bool(self._files.exists(f"{self.address}/{name}"))

    def remove(self, *names: str) -> None:
        """Remove files from the store, as far as they are there."""
        for name in names:
            self._pushed.pop(name, None)
            with reported(self.address), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self.address}/{name}")

    def _differs(self, name: str) -> bool:
        return self._pushed.get(name) != _state(self.folder / name)

    def _read_owner(self) -> dict[str, str]:
        """Return what `claim` wrote last; empty if there is nothing that can be read as that."""
        with reported(self.address):
            try:
                data = json.loads(self._files.cat_file(f"{self.address}/{_OWNER}"))
            except (FileNotFoundError, ValueError):
                return {}
        return data if isinstance(data, dict) else {}


def _file_names(folder: pathlib.Path) -> list[str]:
    """Return the relative paths of a folder's files that are pushed, sorted."""
    names = []
    for parent, folders, files in os.walk(folder):
        relative = pathlib.Path(parent).relative_to(folder)
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and str(relative / name) not in _NOT_PUSHED
        ]  # fmt: skip
        names += [str(relative / name) for name in files if not name.startswith(".")]
    return sorted(names)


def _state(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _empty(folder: pathlib.Path) -> None:
    """Create a folder, and remove what is in it, except hidden files such as its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith("."):
            path.unlink()
