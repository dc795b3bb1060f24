"""The programs of engines that run them as one, see `lockstep`.

A program is manual over the mesh axes of the engines and automatic over `tensor`, so that each
engine computes what it would compute alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rollout.programs import SHARED, Call, Programs

_ENGINES = sharding.RULES["batch"]  # mesh axes over which the engines are


class LockstepPrograms(Programs):
    """Programs of all engines of a mesh, one for each of its tensor groups.

    Caches and host arrays are `Stacked`; parameters and tables are those of each engine.

    Args:
      model: The policy on the mesh, as the trainer has it.
      config, states, running: As for `Programs`.

    Attributes:
      per_engine: Sharding of an array with an entry for each engine.
      num_engines: Number of engines.
    """

    def __init__(self, model: Policy, config: settings.Config, *, states: int, running: int):
        mesh = jax.tree.leaves(nnx.state(model))[0].sharding.mesh
        self.per_engine = NamedSharding(mesh, PartitionSpec(_ENGINES))
        self.num_engines = sharding.num_batch_shards(mesh)
        super().__init__(model, config, states=states, running=running)
        layout = Stacked.of(self._cache_layout).map(
            lambda s: NamedSharding(mesh, PartitionSpec(_ENGINES, *s.spec))
        )
        self.empty = jax.jit(self._empty_engines, out_shardings=(layout, self.per_engine))

    def _params_layout(self, first: Sharding) -> nnx.State:
        layout = super()._params_layout(first)
        return jax.tree.map(
            lambda s: NamedSharding(s.mesh, PartitionSpec(*_without_engines(s.spec))), layout
        )

    def _empty_engines(self) -> tuple["Stacked", "Stacked"]:
        def zeros(x):
            return jnp.zeros((self.num_engines, *x.shape), x.dtype)

        lanes, store = (Stacked.of(shapes) for shapes in jax.eval_shape(self._empty))
        return jax.tree.map(zeros, lanes), jax.tree.map(zeros, store)

    def _on_engines(
        self, function: Callable[..., Any], shared: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Return a function of `Stacked` arguments, except shared ones, with such outputs."""

        @functools.wraps(function)
        def run(*args, **keywords):
            def engine(*args):
                args = [
                    argument if index in shared else argument.map(_without_axis).tree()
                    for index, argument in enumerate(args)
                ]
                outputs = function(*args, **keywords)
                return _stacked_outputs(outputs)

            specs = tuple(
                PartitionSpec() if index in shared else PartitionSpec(_ENGINES)
                for index in range(len(args))
            )
            return jax.shard_map(
                engine, mesh=jax.sharding.get_abstract_mesh(), in_specs=specs,
                out_specs=PartitionSpec(_ENGINES), axis_names=set(_ENGINES), check_vma=False,
            )(*args)  # fmt: skip

        return run

    # Compiling without running

    def calls(self) -> Iterator[Call]:
        for call in super().calls():
            shared = SHARED.get(call.name.partition(" ")[0], ())
            args = tuple(
                argument if index in shared else self._abstract_stack(argument)
                for index, argument in enumerate(call.args)
            )
            yield dataclasses.replace(call, args=args)

    def _abstract_stack(self, argument: Any) -> "Stacked":
        """Return an abstract argument of one engine as that of all."""

        def stack(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec(_ENGINES, *x.sharding.spec)
            sharding = NamedSharding(self.per_engine.mesh, spec)
            return jax.ShapeDtypeStruct((self.num_engines, *x.shape), x.dtype, sharding=sharding)

        return Stacked.of(argument).map(stack)

    def padding(self) -> dict[str, Any]:
        """Return host arguments of an engine that takes no part in a program, by its name."""
        lane, slots = self.num_lanes, self.config.image_cache_tokens

        def zeros(arguments):
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arguments)

        result: dict[str, Any] = {}
        for call in super().calls():
            kind, args = call.name.partition(" ")[0], call.args
            if kind == "encode":
                images, index = zeros(args[2:])
                result[call.name] = images, np.full_like(index, slots)
            elif kind == "extend":
                (new,) = zeros(args[2:3])
                result[call.name] = (new.replace(lane=np.full_like(new.lane, lane)),)
            elif kind == "decode":
                rows, *scalars = zeros((args[2], *args[5:]))
                result[call.name] = (rows.replace(lane=np.full_like(rows.lane, lane)), *scalars)
            elif kind == "fork":
                *pages_and_lane, _ = zeros(args[1:])
                result[call.name] = *pages_and_lane, np.int32(lane)
            elif kind == "read_pages":
                result[call.name] = zeros(args[1:])
            elif kind == "write_pages":
                index, contents = zeros(args[1:])
                result[call.name] = np.full_like(index, self.num_pages), contents
        return result


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A tree of arrays of all engines, each with a leading axis for them.

    Attributes:
      leaves: The arrays.
      structure: Structure of the tree of one engine.
    """

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "Stacked":
        """Return the leaves of a tree of one engine, without the axis."""
        return cls(*jax.tree.flatten(tree))

    def tree(self) -> Any:
        """Return the tree of one engine, when the axis has been removed."""
        return jax.tree.unflatten(self.structure, self.leaves)

    def map(self, function: Callable[[Any], Any]) -> "Stacked":
        """Apply a function to each array."""
        return Stacked([function(x) for x in self.leaves], self.structure)

    def tree_flatten(self):
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure, leaves):
        return cls(list(leaves), structure)


def _stacked_outputs(outputs: Any) -> Any:
    """Return each output of a program, which has one or a tuple of them, with an axis of size 1."""
    if type(outputs) is tuple:
        return tuple(map(_stacked_outputs, outputs))
    return Stacked.of(outputs).map(lambda x: x[None])


def _without_engines(spec: PartitionSpec) -> list[Any]:
    """Return the entries of a spec that do not name the axes of the engines."""
    return [
        None if axes is None or set(_ENGINES) & {*((axes,) if isinstance(axes, str) else axes)}
        else axes
        for axes in spec
    ]  # fmt: skip


def _without_axis(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[1:])
