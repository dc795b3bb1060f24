"""Checkpoints of a training run: `DIR/STEP/` is either a complete training state or absent.

Orbax writes them in the background while the next step runs.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from orbax.checkpoint.experimental import v1 as ocp

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import object_store

_POLICIES = ocp.training.preservation_policies


class Checkpoints:
    """Checkpoints of a run.

    Args:
      directory: Directory of the checkpoints, created if it does not exist, or `gs://` address.
      keep: Number of latest checkpoints to keep, in addition to the best one. None is for
        read-only use: unfinished checkpoints that another process is writing are left alone.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int | None):
        best = _POLICIES.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._in_store = object_store.is_address(directory)
        self._directory = str(directory if self._in_store else pathlib.Path(directory).resolve())
        with self._reported():
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                save_decision_policy=_Always(),
                # The protocol of Orbax and its own policies name different checkpoint types.
                preservation_policy=_POLICIES.AnyPreservationPolicy(  # pyright: ignore[reportArgumentType]
                    [_POLICIES.LatestN(keep), best]
                ),
                cleanup_tmp_directories=keep is not None,  # from a save that was killed
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        """Last saved step, or None if no checkpoint exists."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, metadata: dict[str, Any], *, score: float | None) -> None:
        """Start saving a checkpoint in the background, once the previous save has finished.

        Args:
          step: Last completed step.
          state: Tree of arrays, which may be donated when this method returns.
          metadata: JSON data to store with it.
          score: Score that determines the best checkpoint, if any.
        """
        with self._reported():
            self._checkpointer.save_async(
                step, _arrays_by_path(state), custom_metadata=metadata,
                metrics=None if score is None else {"score": score},
            )  # fmt: skip

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restore (state, metadata) of a step.

        Args:
          step: Step of an existing checkpoint.
          like: Tree of arrays with the shapes, dtypes and shardings to restore.

        Raises:
          UserError: The checkpoint is damaged, or has other array names or shapes.
        """
        arrays = _arrays_by_path(like)
        with self._readable(step):
            saved = self._checkpointer.metadata(step)
            if saved.metadata is None or not isinstance(saved.custom_metadata, dict):
                raise ValueError("its metadata is missing")
        shapes = {name: tuple(x.shape) for name, x in saved.metadata.items()}
        expected = {name: tuple(x.shape) for name, x in arrays.items()}
        if shapes != expected:
            name = min(n for n in shapes | expected if shapes.get(n) != expected.get(n))
            raise UserError(
                f"{self._directory}/{step}: the checkpoint is of another model, or of "
                f"other settings in config.update: {name} has shape {shapes.get(name)}, and this "
                f"run needs {expected.get(name)}. Resume with the settings that the run started "
                f"with, or use another --workdir"
            )
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in arrays.items()
        }
        with self._readable(step):
            loaded = self._checkpointer.load(step, abstract)
        leaves = [loaded[name] for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), saved.custom_metadata

    def close(self) -> None:
        """Wait for pending saves and close the checkpointer."""
        with self._reported():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Report what Orbax raises in the block as damage of a checkpoint."""
        try:
            with self._reported():
                yield
        except (UserError, JaxRuntimeError):  # the latter of another process that has failed
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._directory}/{step}: the checkpoint is damaged: {reason}. Without this "
                "directory, the run resumes from the checkpoint before it, if there is one"
            ) from error

    def _reported(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which failures of an object store are errors of one line."""
        if self._in_store:
            return object_store.reported(self._directory)
        return contextlib.nullcontext()


class _Always:
    """Save policy that always saves, since the training loop decides when to."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        del step, previous_steps, context
        return True


def _arrays_by_path(tree: Any) -> dict[str, jax.Array]:
    """Return the arrays of a tree, keyed by path, in tree order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
