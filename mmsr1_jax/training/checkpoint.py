"""A training run on disk: `DIR/STEP/` holds all that the next step depends on, or does not exist.

Written by Orbax, in the background, while the next step is under way.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

_POLICIES = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a run.

    Args of the constructor:
      directory: made if need be.
      keep: the latest that are kept; the best one is kept beside them. None: to read only, what
        another process is just writing is left alone.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int | None):
        best = _POLICIES.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(directory).resolve(),
            save_decision_policy=_Always(),
            preservation_policy=_POLICIES.AnyPreservationPolicy([_POLICIES.LatestN(keep), best]),
            cleanup_tmp_directories=keep is not None,  # of a save that was killed
        )

    @property
    def latest(self) -> int | None:
        """The last step that was saved, None where there is none."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """The step with the best score; None where none has any."""
        scored = [c for c in self._checkpointer.checkpoints if c.metrics]
        return max(scored, key=lambda c: (c.metrics["score"], c.step)).step if scored else None

    def save(self, step: int, state: Any, notes: dict, *, score: float | None) -> None:
        """Begins to write a step; waits for the one before.

        Args:
          step: that has been done.
          state: a tree of arrays, which may be donated when this returns.
          notes: plain data, JSON.
          score: by which the best is chosen.
        """
        self._checkpointer.save_async(
            step, _named(state), custom_metadata=notes,
            metrics=None if score is None else {"score": score},
        )  # fmt: skip

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, notes) of a step.

        Args:
          step: one of those that there are.
          like: a tree of arrays with the shapes, dtypes and places of what was saved.

        Raises:
          ValueError: another tree was saved.
        """
        names = _named(like)
        saved = self._checkpointer.metadata(step)
        known = {name: tuple(x.shape) for name, x in saved.metadata.items()}
        wanted = {name: tuple(x.shape) for name, x in names.items()}
        if known != wanted:
            odd = sorted(n for n in known | wanted if known.get(n) != wanted.get(n))
            raise ValueError(
                f"{self._checkpointer.directory}/{step}: of another model or other settings of the "
                f"update ({odd[0]}: {known.get(odd[0])} there, {wanted.get(odd[0])} here)"
            )
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in names.items()
        }
        found = self._checkpointer.load(step, abstract)
        leaves = [found[name] for name in names]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), saved.custom_metadata

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


class _Always:
    """When to save is decided by the training loop."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        del step, previous_steps, context
        return True


def _named(tree: Any) -> dict[str, jax.Array]:
    """The tree's arrays by their paths, in its order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
