"""Kernels of accelerators in Pallas' interpreter, on a CPU."""

import dataclasses
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax._src.pallas.mosaic.interpret import thread_map
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from mmsr1_jax.models import (
    gpu_paged_attention,
    gpu_paged_prefill,
    mosaic_gpu,
    paged_attention,
    sharding,
)
from mmsr1_jax.models.families import FAMILIES
from mmsr1_jax.scripts import random_policy


def interpret_tpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make paged attention use jax's TPU kernel and its layout of pages, interpreted."""
    monkeypatch.setattr(paged_attention, "token_major", lambda head_dim: True)
    interpreted = functools.partial(kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", interpreted)
    # The interpreter asks constant indices for their shape, which they do not have.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    jax.clear_caches()  # traces of `ragged_paged_attention` without the interpreter


def compile_gpu_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile an interpreted kernel for NVIDIA GPUs once, not for every thread of each block."""
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                program = jax.jit(lambda *arrays: jax.core.eval_jaxpr(jaxpr, *arrays))
                compiled[id(jaxpr)] = jaxpr, program.lower(consts, *args).compile()
        compiled[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


def one_device_at_a_time(kernel: Callable) -> Callable:
    """Return a function that runs an interpreted GPU kernel on each device of a mesh in turn.

    The interpreter cannot run several at once. The result is like the first argument.
    """
    lock = threading.Lock()

    @functools.cache
    def compiled(**options):
        return jax.jit(functools.partial(kernel, **options))

    def run(*arrays, **options):
        with lock:
            return np.asarray(compiled(**options)(*arrays))

    def call(q, *arrays, **options):
        result = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return jax.pure_callback(functools.partial(run, **options), result, q, *arrays)

    return call


class _Instead:
    """A module with some of its names replaced."""

    def __init__(self, module: types.ModuleType, **names):
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def interpret_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make paged attention use the kernels for GPUs, interpreted.

    They compute in float32, so that the tests compare as closely as with XLA. Tensor cores have
    only bfloat16, and shared memory is tiled for it, but the interpreter has neither.
    """

    def untiled(shape, dtype, *, transforms=()):
        return plgpu.SMEM(shape, dtype)

    for module in (paged_attention, gpu_paged_attention, gpu_paged_prefill, mosaic_gpu):
        monkeypatch.setattr(module, "jnp", _Instead(jnp, bfloat16=jnp.float32))
    for module, name in (
        (gpu_paged_attention, "paged_decode"), (gpu_paged_prefill, "paged_prefill"),
    ):  # fmt: skip
        monkeypatch.setattr(module, "plgpu", _Instead(plgpu, SMEM=untiled))
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(sharding, "is_hopper", lambda: True)
    jax.clear_caches()


INTERPRET = {"tpu": interpret_tpu_kernel, "gpu": interpret_gpu_kernels}


def widen_random_policy() -> None:
    """Give the random policies of the tests heads of 128, as the kernels need; call it first."""
    for family in FAMILIES.values():
        config, released = family.small["random"], next(iter(family.presets.values()))
        text = dataclasses.replace(
            config.text, hidden_size=512, num_heads=4, head_size=released.text.head_size,
            mrope_section=released.text.mrope_section,
        )  # fmt: skip
        vision = dataclasses.replace(config.vision, out_hidden_size=512)
        small: Any = family.small
        small["random"] = dataclasses.replace(config, text=text, vision=vision)
    random_policy.CONFIG = next(iter(FAMILIES.values())).small["random"]
