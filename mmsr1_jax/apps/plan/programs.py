"""The programs of a run, lowered for a mesh of abstract devices.

The trainer has three: `score` (log-probs of a micro-batch), `gradient` (of a micro-batch) and
`step` (the optimiser step). Those of an engine are in `engine`. Each knows what it needs by formula
(`needs`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmsr1_jax.apps.plan import kernels, memory, needs
from mmsr1_jax.apps.plan.targets import Target
from mmsr1_jax.apps.plan.traffic import Kernel
from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import sharding
from mmsr1_jax.models.checkpoint import abstract_model
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import PRESETS, read_config
from mmsr1_jax.models.image_rows import abstract_images
from mmsr1_jax.models.policy import Policy, Rows
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.packing import RowShape, TrainBatch
from mmsr1_jax.rl.train_batch import make_loss
from mmsr1_jax.training import train_utils

_VARIANTS = ("-instruct", "-thinking")  # ends of names of models with the same configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program of a run.

    Attributes:
      name: Its name in the plan.
      phase: Phase of a step that runs it, one of `memory.PHASES`.
      lower: Function that lowers it for the mesh.
      needed_bytes: Bytes that a device must move, by formula.
      flops: FLOPs that a device must compute, by formula.
      devices: Devices that run it, in the order of its mesh.
      recomputed_flops: FLOPs of a device for what the settings compute again, by formula.
      state: Names of the run's state among its arguments (`memory.state_bytes`).
      inputs: Bytes of the other arguments on a device; None: all bytes of arguments less the state,
        for programs that use all of it.
      trips, kernels, branches: Arguments of `traffic.measure`.
    """

    name: str
    phase: str
    lower: Callable[[], jax.stages.Lowered]
    needed_bytes: float
    flops: float
    devices: Sequence[Any]
    recomputed_flops: float = 0.0
    state: frozenset[str] = frozenset()
    inputs: float | None = None
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, Kernel] = dataclasses.field(default_factory=dict)
    branches: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


def model_config(model: str) -> ModelConfig:
    """Return the configuration of a model: a released one by name, or that of a directory.

    A directory that does not exist but has the name of a released model (`families.PRESETS`), such
    as `build/NAME` or `build/NAME-Instruct`, stands for that model.

    Raises:
      UserError: The model is neither.
    """
    path = pathlib.Path(model)
    if path.is_dir():
        return read_config(path)
    name = path.name.lower()
    for variant in _VARIANTS:
        name = name.removesuffix(variant)
    if name not in PRESETS:
        raise UserError(f"--model={model}: neither a directory nor one of {', '.join(PRESETS)}")
    return PRESETS[name]


def make_mesh(config: settings.Config, target: Target) -> Mesh:
    """Return the trainer's mesh of a run on the devices of the target."""
    mesh = config.mesh
    return sharding.make_mesh(mesh.replica, mesh.fsdp, mesh.tensor, devices=target.devices)


def tensor_groups_cross_hosts(mesh: Mesh) -> bool:
    """Return whether any group of devices along the tensor axis spans several hosts."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return any(len({device.process_index for device in group}) > 1 for group in groups)


def trained_dtype(config: settings.Config) -> str:
    """Return the dtype of the trainer's parameters."""
    return config.model.dtype if config.update.lora_rank else "float32"


def make_policy(
    config: settings.Config,
    model: ModelConfig,
    mesh: Mesh,
    param_dtype: str,
    remat: str | None = None,
) -> Policy:
    """Return an abstract policy with the shardings of a mesh.

    Args:
      config: Settings of the run.
      model: Configuration of the policy.
      mesh: Mesh of the parameters.
      param_dtype: Dtype of the parameters.
      remat: Rematerialisation; None: `config.model.remat`.
    """
    policy = abstract_model(
        model,
        param_dtype=param_dtype,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat if remat is None else remat,
        logprob_chunk=config.model.logprob_chunk,
    )
    graph, params = nnx.split(policy)
    return nnx.merge(graph, sharding.abstract_params(params, mesh))


def make_learner(config: settings.Config, model: ModelConfig, mesh: Mesh) -> Learner:
    """Return the abstract learner of a run."""
    return Learner(
        make_policy(config, model, mesh, trained_dtype(config)), make_loss(config.objective),
        config.update, mesh, temperature=config.sampling.temperature or 1.0, seed=config.run.seed,
    )  # fmt: skip


def abstract_batch(shape: RowShape, columns: int, model: ModelConfig, mesh: Mesh) -> TrainBatch:
    """Return an abstract micro-batch.

    Args:
      shape: Shape of the rows.
      columns: Number of loss columns, C.
      model: Configuration of the policy.
      mesh: Mesh over which the rows are sharded.
    """

    def array(*sizes, dtype=jnp.int32) -> Any:
        axes = ("batch",) + (None,) * len(sizes)
        full = (shape.rows, *sizes)
        spec = sharding.partition_spec(axes, full, mesh)
        return jax.ShapeDtypeStruct(full, dtype, sharding=NamedSharding(mesh, spec))

    images = None
    if shape.windows:
        images = jax.tree.map(
            lambda x: array(*x.shape[1:], dtype=x.dtype),
            abstract_images(shape.rows, shape.windows, model.vision),
        )
    rows = Rows(
        tokens=array(shape.length),
        positions=array(3, shape.length),
        segment_ids=array(shape.length),
        prefix_ids=array(shape.length) if shape.shares_prompts else None,
        image_index=array(shape.length),
        images=images,
    )
    floats = ("weights", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
    return TrainBatch(
        rows=rows,
        logit_columns=array(columns),
        targets=array(columns),
        mask=array(columns, dtype=jnp.bool_),
        segment_ids=array(columns),
        **{name: array(columns, dtype=jnp.float32) for name in floats},
    )


def trainer_programs(
    config: settings.Config, model: ModelConfig, mesh: Mesh, learner: Learner
) -> list[Program]:
    """Return the programs of an update.

    All tokens of a row carry loss here, so that memory and time are those of the largest of the
    few shapes that packing produces.

    Args:
      config: Settings of the run.
      model: Configuration of the policy.
      mesh: Mesh of the learner.
      learner: Abstract learner (`make_learner`).
    """
    update, vision = config.update, model.vision
    rows = update.micro_batch_rows * sharding.num_batch_shards(mesh)  # of all processes
    shape = dataclasses.replace(train_utils.row_shape(config, mesh), rows=rows)
    batch = abstract_batch(shape, update.pack_length, model, mesh)
    patches = shape.windows * vision.window_patches
    image_patches = needs.image_patches(config.images, model)
    work = needs.Work(
        rows=rows, length=shape.length, patches=patches,
        image_patches=image_patches, columns=shape.length,
    )  # fmt: skip
    num_devices, itemsize = mesh.size, jnp.dtype(config.model.dtype).itemsize
    trained = memory.device_elements(learner.trained)
    weights = sum(needs.multiplied_weights(model).values()) * itemsize / mesh.shape["tensor"]
    activations = needs.saved_activation_bytes(model, work, itemsize) / num_devices
    full = vision.full_attention_share
    visible = kernels.Visible(
        length=shape.length, parts=1 + shape.shares_prompts, image_patches=image_patches,
        image_keys=needs.image_keys(model, image_patches),
    )  # fmt: skip
    devices = list(mesh.devices.flat)
    common: dict[str, Any] = {
        "devices": devices,
        "kernels": kernels.attention_kernels(visible),
        "branches": {"/cond": (1 - full, full)},  # windows, or the whole image
    }
    policy = frozenset([memory.POLICY])
    programs = [
        Program(
            name="gradient", phase="update", lower=lambda: learner.lower("gradient", batch),
            # Weights forward and backward; the sum of gradients is read and written in float32.
            needed_bytes=2 * weights + 2 * activations + 8.0 * trained,
            flops=needs.gradient_flops(model, work, update) / num_devices,
            recomputed_flops=needs.recomputed_flops(model, work, update, config.model.remat)
            / num_devices,
            state=policy, **common,
        ),
        Program(
            name="step", phase="update", lower=lambda: learner.lower("step", batch),
            # Parameters and two moments are read and written, gradients read.
            needed_bytes=28.0 * trained, flops=0.0, devices=devices,
            state=frozenset([memory.OPTIMIZER]) | (policy if not update.lora_rank else frozenset()),
        ),
    ]  # fmt: skip
    objective = config.objective
    several_updates = objective.old_logprobs == "trainer" and objective.num_minibatches > 1
    if objective.kl_coef or several_updates:
        score = Program(
            name="score", phase="score", lower=lambda: learner.lower("score", batch),
            needed_bytes=weights,
            flops=sum(needs.forward_flops(model, work).values()) / num_devices,
            state=policy, **common,
        )  # fmt: skip
        programs.insert(0, score)
    return programs
