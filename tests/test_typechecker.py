"""Arrays of a wrong shape or dtype are rejected in tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mmsr1_jax.models.attention import attention
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.rl.loss import clipped_objective

B, T, N, K, H = 2, 8, 4, 2, 16
Q, KV = jnp.zeros((B, T, N, H)), jnp.zeros((B, T, K, H))
SEGMENT_IDS = jnp.ones((B, T), jnp.int32)


def test_consistent_shapes_are_accepted():
    assert attention(Q, KV, KV, SEGMENT_IDS, causal=True).shape == Q.shape


@pytest.mark.parametrize(
    "arrays",
    [
        (Q, KV[:, :, :, 1:], KV, SEGMENT_IDS),  # two values of H
        (Q, KV, KV, SEGMENT_IDS[:, 1:]),  # two values of T
        (Q, KV, KV, SEGMENT_IDS[0]),  # no B
        (Q, KV, KV, SEGMENT_IDS.astype(jnp.float32)),
        (Q.astype(jnp.int32), KV, KV, SEGMENT_IDS),
    ],
)
def test_inconsistent_arguments_raise(arrays):
    with pytest.raises(TypeCheckError):
        attention(*arrays, causal=True)
    with pytest.raises(TypeCheckError):  # also when traced
        jax.jit(lambda *x: attention(*x, causal=True)).lower(*arrays)


def test_broadcasting_between_arguments_raises():
    with pytest.raises(TypeCheckError):
        clipped_objective(jnp.ones((B, T)), jnp.ones((B, 1)), 0.2, 0.2)


def test_dataclasses_of_arrays_are_checked_but_not_those_of_shardings():
    fields = (
        np.zeros((B, T, 6), np.float32), np.zeros((B, T, 2), np.int32),
        np.zeros((B, T), np.int32), np.zeros((B, T), np.int32),
    )  # fmt: skip
    rows = ImageRows(*fields)
    with pytest.raises(TypeCheckError):
        ImageRows(*fields[:3], window_ids=fields[3][:, 1:])
    shardings = jax.tree.map(lambda x: jnp.asarray(x).sharding, rows)
    assert isinstance(shardings, ImageRows)
