"""Policy update: gradients of micro-batches are accumulated in float32, then applied with AdamW.

    for batch in micro-batches:   gradients += d/dp sum of the batch's weighted losses
    parameters -= learning_rate * adamw(clipped gradients)

All token weights are computed beforehand, so the accumulated sum equals the loss regardless of
packing and the number of devices. A step with a non-finite loss or gradient is skipped. With LoRA
(`rl/lora.py`) only the adapters are trained, and only they have optimiser state.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.rl import lora
from mmsr1_jax.rl.packing import TrainBatch
from mmsr1_jax.utils import processes

# Maps the log-probs and entropies of a batch's tokens, float32[B, C] each, to the loss (a sum) and
# named sums. All are accumulated over micro-batches.
LossFunction = Callable[[jax.Array, jax.Array, TrainBatch], tuple[jax.Array, dict[str, jax.Array]]]


class Learner:
    """Policy parameters, optimiser state, and the jitted functions that update them.

    With an abstract model (`sharding.abstract_params`), all state is abstract, and only `lower` can
    be called.

    Args:
      model: Policy; the first step donates its parameters. With LoRA, adapters are attached to it.
      loss: Loss function, see `LossFunction`.
      config: Settings of the update.
      mesh: Mesh of the parameters.
      temperature: Sampling temperature of the tokens.
      seed: Seed for initialising adapters.

    Attributes:
      trained, frozen: Trained and frozen parameters; `config.freeze_vision` freezes the vision
        tower. With LoRA the adapters are trained and everything else is frozen.
      optimizer: Optimiser state.
    """

    def __init__(
        self,
        model: Policy,
        loss: LossFunction,
        config: settings.Update,
        mesh: Mesh,
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        self.mesh = mesh
        self._loss, self._temperature = loss, temperature
        self._precision = "highest" if model.dtype == jnp.float32 else None
        self._plain_graph = nnx.split(model)[0]
        self._merge = None
        self._layout: Any = None  # shardings of the state while it is in host memory
        is_trained = _is_trained(config.freeze_vision)
        if config.lora_rank:
            lora.attach(
                model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
                mesh=mesh, seed=seed,
            )  # fmt: skip
            is_trained = nnx.LoRAParam
        self._graph, self.trained, self.frozen = nnx.split(model, is_trained, ...)
        if config.lora_rank:
            self._merge = self._jit_merge(config.lora_alpha / config.lora_rank)
        self._transform = _adamw(config)
        self.optimizer = self._jit_functions(model.dtype)

    def _jit_merge(self, scale: float):
        """Return a jitted function that merges adapters into the kernels."""
        merge = functools.partial(lora.merge, scale=scale)
        merged = jax.eval_shape(merge, self.trained, self.frozen)
        return jax.jit(merge, out_shardings=sharding.param_shardings(merged, self.mesh))

    def _jit_functions(self, dtype: jnp.dtype) -> optax.OptState:
        """Create the jitted functions and return the initial optimiser state."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        trained = sharding.param_shardings(self.trained, self.mesh)
        optimizer = optax.tree.map_params(
            self._transform,
            lambda _, param_sharding: param_sharding,
            jax.eval_shape(self._transform.init, self.trained),
            trained,
            transform_non_params=lambda _: replicated,
        )
        self._zeros = jax.jit(
            lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), p),
            out_shardings=trained,
        )
        with jax.set_mesh(self.mesh):
            options = sharding.compiler_options(vmem_mib=32)
        self._accumulate = jax.jit(
            self._accumulate_gradients, donate_argnums=2, out_shardings=(trained, replicated),
            compiler_options=options,
        )  # fmt: skip
        self._apply = jax.jit(
            self._apply_gradients,
            donate_argnums=(0, 1),
            out_shardings=(trained, optimizer, replicated),
        )
        by_rows = None  # as the compiler likes; with several processes, each has its own rows
        if processes.count() > 1:
            by_rows = NamedSharding(self.mesh, PartitionSpec(sharding.RULES["batch"], None))
        self._logprobs = jax.jit(
            self._compute_logprobs, out_shardings=by_rows, compiler_options=options
        )
        self._copy = jax.jit(
            lambda p: jax.tree.map(lambda x: x.astype(dtype).copy(), p), out_shardings=trained
        )
        if sharding.is_abstract(self.trained):
            state = jax.eval_shape(self._transform.init, self.trained)
            return sharding.with_shardings(state, optimizer)
        return jax.jit(self._transform.init, out_shardings=optimizer)(self.trained)

    @property
    def params(self) -> nnx.State:
        """All parameters of the policy, as in `nnx.split(model)[1]`.

        With LoRA, each access merges the current adapters into the base parameters.
        """
        if self._merge is None:
            return nnx.merge_state(self.trained, self.frozen)
        return nnx.merge_state(self.frozen, self._merge(self.trained, self.frozen))

    def model(self) -> Policy:
        """Return the policy with `params`."""
        return nnx.merge(self._plain_graph, self.params)

    def snapshot(self, memory: str | None = None) -> nnx.State:
        """Return a copy of the trained parameters in the compute dtype, for a reference policy.

        With LoRA, newly initialised adapters contribute nothing, so their snapshot represents the
        initial policy.

        Args:
          memory: Memory kind of the copy, such as `pinned_host`; None for device memory.
        """
        copy = self._copy(self.trained)
        if memory is None:
            return copy
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), copy)

    def offload(self) -> None:
        """Move parameters and optimiser state to pinned host memory, until `restore`."""
        state = self.trained, self.frozen, self.optimizer
        self._layout = jax.tree.map(lambda x: x.sharding, state)
        host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), self._layout)
        self.trained, self.frozen, self.optimizer = jax.tree.map(_move, state, host)

    def restore(self) -> None:
        """Bring parameters and optimiser state back to the devices after `offload`."""
        if self._layout is not None:
            state = self.trained, self.frozen, self.optimizer
            self.trained, self.frozen, self.optimizer = jax.tree.map(_move, state, self._layout)
            self._layout = None

    def shard_batch(self, batch: TrainBatch) -> TrainBatch:
        """Return a micro-batch of host arrays as arrays sharded over the devices."""
        return sharding.shard_batch(batch, self.mesh)

    def logprobs(
        self, batches: Sequence[TrainBatch], trained: nnx.State | None = None
    ) -> list[Float32[np.ndarray, "B C"]]:
        """Return the log-probs of the loss tokens as one NumPy float32[B, C] per micro-batch.

        With several processes, of the rows of this one.

        Args:
          batches: Micro-batches of host arrays.
          trained: Snapshot of the trained parameters; None for the current parameters.
        """
        trained = self.trained if trained is None else self._on_device(trained)
        with self._mesh_and_precision():
            logprobs = [
                self._logprobs(trained, self.frozen, self.shard_batch(batch)) for batch in batches
            ]
        return [sharding.local_rows(x) for x in logprobs]

    def update(self, batches: Sequence[TrainBatch], learning_rate: float) -> dict[str, float]:
        """Take one optimiser step with the gradient of all micro-batches.

        Args:
          batches: Micro-batches of host arrays.
          learning_rate: Learning rate of this step.

        Returns:
          The loss function's sums over all batches, `loss`, `gradient_norm` (before clipping), and
          `finite`, which is 0 if the step was skipped.
        """
        with self._mesh_and_precision():
            gradients, batch_sums = self._zeros(self.trained), []
            for batch in batches:
                gradients, sums = self._accumulate(
                    self.trained, self.frozen, gradients, self.shard_batch(batch)
                )
                batch_sums.append(sums)
            total = jax.tree.map(lambda *xs: sum(xs[1:], start=xs[0]), *batch_sums)
            self.trained, self.optimizer, metrics = self._apply(
                self.trained, self.optimizer, gradients, total["loss"], np.float32(learning_rate)
            )
        return {name: float(x) for name, x in jax.device_get(total | metrics).items()}

    def lower(self, program: str, batch: TrainBatch) -> jax.stages.Lowered:
        """Return a lowered program, for inspection.

        Args:
          program: `score` (log-probs of a micro-batch), `gradient` (of a micro-batch, added to the
            sum so far) or `step` (the optimiser step).
          batch: Micro-batch of host arrays, or of abstract arrays with shardings.
        """
        trained, frozen, scalar = self.trained, self.frozen, np.float32(0)
        gradients = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), trained
        )
        if not sharding.is_abstract(batch):
            batch = self.shard_batch(batch)
        functions = {
            "score": (self._logprobs, (trained, frozen, batch)),
            "gradient": (self._accumulate, (trained, frozen, gradients, batch)),
            "step": (self._apply, (trained, self.optimizer, gradients, scalar, scalar)),
        }
        function, arguments = functions[program]
        with self._mesh_and_precision():
            return function.lower(*arguments)

    def _mesh_and_precision(self) -> contextlib.ExitStack:
        """Return a context that sets the mesh and, in float32, the highest matmul precision."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(jax.default_matmul_precision(self._precision))
        return stack

    def _on_device(self, trained: nnx.State) -> nnx.State:
        def put(x, like):
            return x if x.sharding == like.sharding else jax.device_put(x, like.sharding)

        return jax.tree.map(put, trained, self.trained)

    # Functions that `_jit_functions` compiles

    def _statistics(self, trained, frozen, batch: TrainBatch):
        model = nnx.merge(self._graph, trained, frozen)
        return model.statistics(
            batch.rows, batch.logit_columns, batch.targets, temperature=self._temperature
        )

    def _compute_logprobs(self, trained, frozen, batch: TrainBatch):
        return self._statistics(trained, frozen, batch)[0]

    def _accumulate_gradients(self, trained, frozen, total, batch: TrainBatch):
        def loss(trained):
            return self._loss(*self._statistics(trained, frozen, batch), batch)

        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients)
        return total, {**sums, "loss": value}

    def _apply_gradients(self, trained, optimizer, gradients, loss, learning_rate):
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, new_optimizer = self._transform.update(gradients, optimizer, trained)
        new_trained = jax.tree.map(
            lambda p, u: (p - learning_rate * u).astype(p.dtype), trained, updates
        )

        def select(new, old):
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        trained, optimizer = select(new_trained, trained), select(new_optimizer, optimizer)
        return trained, optimizer, {"gradient_norm": norm, "finite": finite}


def _move(x: jax.Array, sharding: Any) -> jax.Array:
    """Return a copy of an array in another kind of memory, and delete the array."""
    moved = jax.block_until_ready(jax.device_put(x, sharding))
    x.delete()
    return moved


def _adamw(config: settings.Update) -> optax.GradientTransformation:
    """Return gradient clipping and AdamW, without the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def _is_trained(freeze_vision: bool) -> Callable[..., bool]:
    """Return an NNX filter that selects the trained parameters."""

    def is_trained(path, value) -> bool:
        return not (freeze_vision and path[0] == "vision")

    return is_trained
