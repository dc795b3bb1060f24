"""Placement of parameters and the cache on devices: shardings of an engine, and transfers.

A trainer's parameters reach the engines without the host: one program casts them and leaves a copy
on each group of devices (`engine_layout_on`), and each engine keeps its shards (`transfer`).
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from mmsr1_jax.models import paged_attention
from mmsr1_jax.models.sharding import partition_spec
from mmsr1_jax.rollout import cache


def replicated(sharding: Sharding) -> Sharding:
    """Return the sharding that replicates an array over the devices of `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def cache_shardings(empty: cache.Cache, params: Sharding) -> cache.Cache:
    """Return the shardings of the cache: kv heads over the tensor axis, the rest replicated.

    Args:
      empty: The cache, or its shapes.
      params: Sharding of a parameter, on the devices of the engine.
    """
    if not isinstance(params, NamedSharding):
        return jax.tree.map(lambda _: params, empty)
    shape = empty.pages[0].shape
    spec = partition_spec(paged_attention.AXES[len(shape)], shape, params.mesh)
    pages: Any = (NamedSharding(params.mesh, spec),) * len(empty.pages)
    rest: Any = replicated(params)
    return cache.Cache(pages=pages, hidden=rest)


def engine_layout_on(mesh: Mesh, layout: nnx.State) -> nnx.State:
    """Return an engine's layout on a trainer's mesh.

    Parameters are sharded over the tensor axis alone, or replicated if the two meshes have tensor
    axes of different sizes.
    """

    def tensor_size(mesh: Mesh | AbstractMesh) -> int:
        return mesh.shape.get("tensor", 1)

    def on_mesh(sharding: Sharding) -> NamedSharding:
        if isinstance(sharding, NamedSharding) and tensor_size(sharding.mesh) == tensor_size(mesh):
            return NamedSharding(mesh, sharding.spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(on_mesh, layout)


def transfer(arrays: nnx.State, layout: nnx.State) -> nnx.State:
    """Transfer arrays to a layout on other devices, or a subset of theirs, without the host.

    Shards that a device already holds are shared, not copied. The others are copied from a device
    that holds them.
    """
    return jax.tree.map(_transfer_array, arrays, layout)


def _transfer_array(x: jax.Array, sharding: Sharding) -> jax.Array:
    def key(index: tuple[slice, ...] | None) -> tuple[tuple[int, int, int], ...]:
        assert index is not None  # all shards are on addressable devices
        return tuple(part.indices(size) for part, size in zip(index, x.shape, strict=True))

    copies: dict[tuple, dict[Any, jax.Array]] = {}  # of each shard, by device
    for shard in x.addressable_shards:
        copies.setdefault(key(shard.index), {})[shard.device] = shard.data
    shards = []
    for device, index in sharding.addressable_devices_indices_map(x.shape).items():
        sources = copies.get(key(index))
        if sources is None:  # sharded differently: use a full copy if one exists
            full = x.addressable_shards[0].data if x.is_fully_replicated else x
            return jax.device_put(full, sharding)
        local = sources.get(device)
        shards.append(
            jax.device_put(next(iter(sources.values())), device) if local is None else local
        )
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
