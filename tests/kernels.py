"""Kernels of accelerators in Pallas' interpreter, on a CPU."""

import dataclasses
import functools

import jax
import pytest
from jax._src import literals
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from mmsr1_jax.models import paged_attention
from mmsr1_jax.scripts import random_policy


def interpret_tpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make paged attention use jax's TPU kernel and its layout of pages, interpreted."""
    monkeypatch.setattr(paged_attention, "token_major", lambda head_dim: True)
    interpreted = functools.partial(kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", interpreted)
    # The interpreter asks constant indices for their shape, which they do not have.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    jax.clear_caches()  # traces of `ragged_paged_attention` without the interpreter


def widen_random_policy() -> None:
    """Give the random policy of the tests heads of 128, as the kernels need; call it first."""
    config = random_policy.CONFIG
    text = dataclasses.replace(
        config.text, hidden_size=512, num_heads=4, mrope_section=(16, 24, 24)
    )
    vision = dataclasses.replace(config.vision, out_hidden_size=512)
    random_policy.CONFIG = dataclasses.replace(config, text=text, vision=vision)
