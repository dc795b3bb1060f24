"""The directory of a training run, on a disk or in an object store."""

import contextlib
import dataclasses
import pathlib
import uuid
from collections.abc import Iterator

from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.utils import object_store, outputs, processes
from mmsr1_jax.utils.object_store import ObjectStore

# Files and folders of an earlier command that a run reads when it resumes.
_RESUMED = ("config.json", "metrics.jsonl", "policy_step", "wandb_id")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Directory of a run. As text it is what `--workdir` names.

    Attributes:
      path: Directory in which this process reads and writes files, except checkpoints. On a disk
        all processes have the same; with a store each has its own, which is lost with the machine.
      store: Object store that keeps the files of `path`; None: the run is on a disk.
      saved_steps: Steps with a complete checkpoint when the command started, ascending.
    """

    path: pathlib.Path
    store: ObjectStore | None = None
    saved_steps: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.path) if self.store is None else self.store.address

    @property
    def checkpoints(self) -> str:
        """Directory or address of the checkpoints, which all processes write."""
        return f"{self}/checkpoints"

    def has_folder(self, name: str) -> bool:
        """Return whether the run has a folder of this name."""
        return (self.path / name).is_dir() if self.store is None else self.store.holds(name)

    def push(self, *names: str) -> None:
        """Push files to the store, if there is one; see `ObjectStore.push`."""
        if self.store is not None:
            self.store.push(*names)

    def pull(self, *names: str) -> None:
        """Pull files from the store, if there is one; see `ObjectStore.pull`."""
        if self.store is not None:
            self.store.pull(*names)

    def remove(self, *names: str) -> None:
        """Remove files from the directory and the store, as far as they are there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if self.store is not None:
            self.store.remove(*names)


@contextlib.contextmanager
def open_store(address: str) -> Iterator[Workdir]:
    """Yield the directory of a run in an object store, with what a resumed run reads of it.

    It belongs to this command until another one opens it. All processes must call it together.

    Raises:
      UserError: The address is invalid, or gcsfs is not installed.
      ProcessError: The processes have different addresses.
      StoreError: The store refuses a request.
      LockedError: Another command of this machine uses the directory.
    """
    processes.agree({"--workdir": address})
    path = object_store.local_folder(address, processes.index())
    with outputs.lock(path):
        store = ObjectStore(address, path)
        owner = processes.broadcast("owner", uuid.uuid4().hex)
        if processes.main():
            store.claim(owner)
        processes.barrier("owner written")
        store.check_owner(owner)
        store.pull(*_RESUMED)
        with contextlib.closing(Checkpoints(f"{store.address}/checkpoints", keep=None)) as saved:
            steps = tuple(saved.steps)
        yield Workdir(path, store, steps)
