"""The update: gradients of micro-batches summed in float32, then a step of AdamW.

    for batch in micro-batches:   gradients += d/dp sum of the batch's weighted losses
    parameters -= rate * adamw(clipped gradients)

The weights of all tokens are known before, so that the sum is the loss, however the episodes were
packed and on however many devices. A step whose gradient is not finite changes nothing. With LoRA
(`rl/lora.py`) adapters are all that is trained, and all that the optimiser has a state for.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl import Qwen2_5_VL
from mmsr1_jax.rl import lora
from mmsr1_jax.rl.packing import TrainBatch

# From the log-probs and entropies of a batch's tokens, float32[B, C] each: the loss (a sum) and
# sums by name, which are added up over micro-batches.
Loss = Callable[[jax.Array, jax.Array, TrainBatch], tuple[jax.Array, dict[str, jax.Array]]]


class Learner:
    """Parameters, optimiser, and the programs that change them.

    Args of the constructor:
      model: the policy; its parameters are consumed by the first step. With LoRA it is given
        adapters.
      loss: see `Loss`.
      config: `config.Update`.
      mesh: on which the parameters are.
      temperature: at which tokens were sampled.
      seed: of fresh adapters.

    Attributes:
      trained, frozen: the parameters; the vision tower's are frozen by setting. With LoRA the
        adapters are trained and all else is frozen.
      optimizer: the optimiser's state.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        loss: Loss,
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
        is_trained = _is_trained(config.freeze_vision)
        if config.lora_rank:
            lora.attach(
                model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
                mesh=mesh, seed=seed,
            )  # fmt: skip
            is_trained = nnx.LoRAParam
        self._graph, self.trained, self.frozen = nnx.split(model, is_trained, ...)
        if config.lora_rank:
            scale = config.lora_alpha / config.lora_rank
            merge = functools.partial(lora.merge, scale=scale)
            merged = sharding.param_shardings(
                jax.eval_shape(merge, self.trained, self.frozen), mesh
            )
            self._merge = jax.jit(merge, out_shardings=merged)
        self._transform = optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm)
            if config.max_grad_norm
            else optax.identity(),
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            optax.add_decayed_weights(config.weight_decay),
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        layout = sharding.param_shardings(self.trained, mesh)
        shapes = jax.eval_shape(self._transform.init, self.trained)
        optimizer_layout = optax.tree.map_params(
            self._transform,
            lambda _, place: place,
            shapes,
            layout,
            transform_non_params=lambda _: everywhere,
        )
        self.optimizer = jax.jit(self._transform.init, out_shardings=optimizer_layout)(self.trained)
        self._zeros = jax.jit(
            lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), p),
            out_shardings=layout,
        )
        self._gradients = jax.jit(
            self._gradients_of, donate_argnums=2, out_shardings=(layout, everywhere)
        )
        self._step = jax.jit(
            self._step_of,
            donate_argnums=(0, 1),
            out_shardings=(layout, optimizer_layout, everywhere),
        )
        self._score = jax.jit(self._score_of)
        self._copy = jax.jit(
            lambda p: jax.tree.map(lambda x: x.astype(model.dtype).copy(), p), out_shardings=layout
        )

    @property
    def params(self) -> nnx.State:
        """All parameters of the policy, as `nnx.split(model)[1]`. With LoRA those of the policy
        without adapters, into which the present ones are merged, each time it is asked for."""
        if self._merge is None:
            return nnx.merge_state(self.trained, self.frozen)
        return nnx.merge_state(self.frozen, self._merge(self.trained, self.frozen))

    def model(self) -> Qwen2_5_VL:
        """The policy with `params`."""
        return nnx.merge(self._plain_graph, self.params)

    def snapshot(self, memory: str | None = None) -> nnx.State:
        """A copy of the trained parameters in the dtype of computation, for a reference policy.
        Of fresh adapters, which add nothing, it makes the policy that training began with.

        Args:
          memory: kind of memory that it is to lie in (`pinned_host`); None: the device's own.
        """
        copy = self._copy(self.trained)
        if memory is None:
            return copy
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), copy)

    def put(self, batch: TrainBatch) -> TrainBatch:
        """A micro-batch of host arrays, on the devices."""
        return sharding.shard_batch(batch, self.mesh)

    def score(self, batches: Sequence[TrainBatch], trained: nnx.State | None = None):
        """Log-probs of the tokens with loss, float32[B, C] of numpy for each micro-batch.

        Args:
          batches: of host arrays.
          trained: a snapshot; None: the present parameters.
        """
        trained = self.trained if trained is None else self._on_device(trained)
        with self._set_up():
            found = [self._score(trained, self.frozen, self.put(batch)) for batch in batches]
        return [np.asarray(x) for x in found]

    def update(self, batches: Sequence[TrainBatch], rate: float) -> dict[str, float]:
        """One step with the gradient of all micro-batches.

        Args:
          batches: of host arrays.
          rate: of learning, for this step.

        Returns:
          The loss's sums over all batches, and `loss`, `gradient_norm` (before clipping) and
          `finite`: 0 where the step was not taken.
        """
        with self._set_up():
            gradients, parts = self._zeros(self.trained), []
            for batch in batches:
                gradients, sums = self._gradients(
                    self.trained, self.frozen, gradients, self.put(batch)
                )
                parts.append(sums)
            total = jax.tree.map(lambda *xs: sum(xs[1:], start=xs[0]), *parts)
            self.trained, self.optimizer, found = self._step(
                self.trained, self.optimizer, gradients, total["loss"], np.float32(rate)
            )
        return {name: float(x) for name, x in jax.device_get(total | found).items()}

    def lower(self, batch: TrainBatch):
        """The program of gradients for such a batch, to be looked at."""
        with self._set_up():
            return self._gradients.lower(
                self.trained, self.frozen, self._zeros(self.trained), self.put(batch)
            )

    def _set_up(self):
        """The mesh, and the precision of float32: see `score`."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(jax.default_matmul_precision(self._precision))
        return stack

    def _on_device(self, trained: nnx.State) -> nnx.State:
        def put(x, like):
            return x if x.sharding == like.sharding else jax.device_put(x, like.sharding)

        return jax.tree.map(put, trained, self.trained)

    # The programs

    def _statistics(self, trained, frozen, batch: TrainBatch):
        model = nnx.merge(self._graph, trained, frozen)
        return model.statistics(
            batch.rows, batch.before, batch.targets, temperature=self._temperature
        )

    def _score_of(self, trained, frozen, batch: TrainBatch):
        return self._statistics(trained, frozen, batch)[0]

    def _gradients_of(self, trained, frozen, total, batch: TrainBatch):
        def loss(trained):
            return self._loss(*self._statistics(trained, frozen, batch), batch)

        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients)
        return total, {**sums, "loss": value}

    def _step_of(self, trained, optimizer, gradients, loss, rate):
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, after = self._transform.update(gradients, optimizer, trained)
        changed = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trained, updates)
        trained = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, trained)
        optimizer = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, optimizer)
        return trained, optimizer, {"gradient_norm": norm, "finite": finite}


def _is_trained(freeze_vision: bool):
    """A filter of NNX for the parameters that are trained."""

    def chosen(path, value) -> bool:
        return not (freeze_vision and path[0] == "vision")

    return chosen
