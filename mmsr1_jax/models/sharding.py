"""The device mesh and the table that maps logical axes to mesh axes.

Mesh axes: `replica` (copies of the parameters; gradients are averaged over it), `fsdp` (parameters
and batch are both split over it) and `tensor` (heads, feed-forward and vocabulary are split).
A dimension whose size its mesh axes do not divide is not split: two kv heads on a tensor axis of
four are replicated, and so is a batch of one row.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mmsr1_jax.config.errors import UserError

Tree = TypeVar("Tree")

MESH_AXES = ("replica", "fsdp", "tensor")

# Logical axis -> mesh axes. This table alone defines the sharding strategy. Axes that are not
# listed (layers, head_dim, patch, position ...) are not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
}


def make_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh over all devices (or `devices`). One size may be -1 to use all remaining ones.

    With several processes, the devices of a tensor group belong to one of them, and each process
    has consecutive shards of a batch.

    Raises:
      UserError: The product of the sizes is not the number of devices, processes have different
        numbers of devices, or a tensor group would need devices of several processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh: sizes {sizes} must be positive, one of them may be -1")
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        named = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh: {named} does not match {len(devices)} devices")
    axis_types = (AxisType.Auto,) * 3
    per_process = collections.Counter(device.process_index for device in devices)
    if len(per_process) == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)
    if len(set(per_process.values())) > 1:
        counts = ", ".join(f"process {p}: {n}" for p, n in sorted(per_process.items()))
        raise UserError(f"mesh: all processes need the same number of devices ({counts})")
    if any(number % sizes[2] for number in per_process.values()):
        process, number = min(per_process.items(), key=lambda item: item[1])
        raise UserError(
            f"mesh: config.mesh.tensor={sizes[2]} does not divide the {number} devices of process "
            f"{process}: tensor parallelism must not cross processes"
        )
    # Not `make_mesh`, which orders the devices of a TPU slice by its torus alone.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(sizes), MESH_AXES, axis_types=axis_types)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Return the partition spec of an array whose dimensions have the logical axes `axes`.

    Example, on a mesh of fsdp=2, tensor=4:
      `("embed", "kv_heads", "head_dim")` of shape `(512, 2, 64)` -> `P("fsdp", None, None)`.
    """
    spec, sizes = [], _automatic_axes(mesh)
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in _mesh_axes(name) if sizes.get(a, 1) > 1)
        shards = int(np.prod([sizes[a] for a in mesh_axes]))
        spec.append(mesh_axes if mesh_axes and size % shards == 0 else None)
    return PartitionSpec(*spec)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    return () if name is None else RULES.get(name, ())


def _automatic_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return the sizes of the mesh axes over which a program is to be split.

    Inside a `shard_map` over some axes, they are the others.
    """
    manual = mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()
    return {name: size for name, size in mesh.shape.items() if name not in manual}


def num_devices() -> int:
    """Return the number of devices of the current mesh over which a program is split.

    It is 1 without a mesh. Inside a `shard_map` over some axes, the others count.
    """
    return int(np.prod([*_automatic_axes(jax.sharding.get_abstract_mesh()).values()]))


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return a function that runs on each device's own shards, with the mesh of `jax.set_mesh`.

    Inside a `shard_map` over some axes, specs name the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
        axis_names=set(_automatic_axes(mesh)), check_vma=False,
    )  # fmt: skip


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation inside `jit`; a no-op without `jax.set_mesh`."""
    if num_devices() == 1:
        return x
    spec = partition_spec(axes, x.shape, jax.sharding.get_abstract_mesh())
    return jax.lax.with_sharding_constraint(x, spec)


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return a parameter gathered from the devices that split the batch.

    Left to itself, XLA may keep the parameter in place and exchange partial sums of what is
    computed with it, which are as large as activations and are added in their dtype.

    Args:
      x: Parameter, or a part of one.
      axes: Logical axis of each dimension.
    """
    batch = set(RULES["batch"])
    return constrain(x, *(None if batch & set(_mesh_axes(axis)) else axis for axis in axes))


def mesh_axis_size(name: str) -> int:
    """Return the size of a logical axis's mesh axes in the current mesh (1 without a mesh)."""
    sizes = _automatic_axes(jax.sharding.get_abstract_mesh())
    return int(np.prod([sizes.get(a, 1) for a in _mesh_axes(name)]))


def platform() -> str:
    """Return the platform that a function is traced for: `cpu`, `gpu` or `tpu`.

    It is that of the mesh set by `jax.set_mesh`, whose devices may exist on another machine only
    (`mmsr1 plan`), or that of the default backend without a mesh.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def compiler_options(vmem_mib: int) -> dict[str, Any] | None:
    """Return options for compiling programs made of large matrix products.

    With more on-chip memory than its default of 16 MiB, a TPU's compiler expects 1.1 to 1.3 times
    the speed of products, and takes up to twice as long.

    Args:
      vmem_mib: Mebibytes of on-chip memory that an operation may use.
    """
    if platform() != "tpu":
        return None
    return {"xla_tpu_scoped_vmem_limit_kib": str(1024 * vmem_mib)}


def is_hopper() -> bool:
    """Return whether a function is traced for a GPU of the Hopper generation."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return any(name in kind for name in ("H100", "H20", "H800"))  # H20 also matches H200


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: jax.nn.initializers.Initializer,
    dtype: DTypeLike,
) -> nnx.Param:
    """Create a parameter from its shape, logical axes (one per dimension), initialiser and dtype.

    Raises:
      ValueError: If the numbers of axes and dimensions differ.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for shape {tuple(shape)}")
    return nnx.Param(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))


def param_shardings(params: Tree, mesh: Mesh) -> Tree:
    """Return a pytree of parameters, concrete or abstract, with their shardings as values.

    Args:
      params: Pytree of `nnx.Param` with logical axes, such as `nnx.split(model)[1]`.
      mesh: Mesh for the parameters.
    """
    return jax.tree.map(
        lambda p: p.replace(
            NamedSharding(mesh, partition_spec(p.get_metadata("axes"), p.get_value().shape, mesh))
        ),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def abstract_params(params: Tree, mesh: Mesh) -> Tree:
    """Return abstract parameters that have the shardings of the table, for lowering a program.

    Args:
      params: Pytree of `nnx.Param` with logical axes, concrete or abstract.
      mesh: Mesh for the parameters; its devices need not exist on this machine.
    """
    return with_shardings(params, param_shardings(params, mesh))


def with_shardings(tree: Tree, shardings: Any) -> Tree:
    """Return the abstract arrays of a pytree with shardings, a pytree of the same structure."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def is_abstract(tree: Any) -> bool:
    """Return whether a pytree contains abstract arrays."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Put a pytree of host arrays on the mesh, with rows (dimension 0) split over the batch axes.

    Arrays are [B, ...]. With several processes, B is the number of rows of this one.
    """
    processes = _num_processes(mesh)

    def put(x):
        axes = ("batch",) + (None,) * (np.ndim(x) - 1)
        shape = (processes * np.shape(x)[0], *np.shape(x)[1:])
        sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh))
        if processes == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(put, batch)


def shard_whole_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Put a pytree of host arrays [B, ...] on the mesh, as `shard_batch` does.

    With several processes, each passes the same B rows, those of the whole batch.
    """

    def put(x):
        axes = ("batch",) + (None,) * (np.ndim(x) - 1)
        sharding = NamedSharding(mesh, partition_spec(axes, np.shape(x), mesh))
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def local_rows(x: jax.Array) -> np.ndarray:
    """Return the rows (dimension 0) of this process of an array that `shard_batch` would split."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def to_host(x: jax.Array) -> np.ndarray:
    """Return an array as a host array; gathered if other processes hold parts of it.

    With several processes, all must call this together.
    """
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _num_processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def num_local_batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch that this process holds."""
    return num_batch_shards(mesh) // _num_processes(mesh)


def num_batch_shards(mesh: Mesh) -> int:
    """Return the number of shards into which the mesh splits a batch."""
    return int(np.prod([mesh.shape[a] for a in RULES["batch"]]))
