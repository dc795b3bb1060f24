"""Forms of the layers for TPUs compute the same as the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models import layers
from mmsr1_jax.models.layers import Adapter, Linear, rotate


def on_tpu(monkeypatch):
    monkeypatch.setattr(layers.sharding, "platform", lambda: "tpu")


@pytest.mark.parametrize("padding", [0, 6])
def test_rotary_embedding_turns_pairs_of_elements(padding, monkeypatch):
    """As complex numbers times exp(i angle), in float64, and back for the gradient."""
    on_tpu(monkeypatch)
    rng = np.random.default_rng(0)
    pairs, g = (rng.normal(size=(2, 7, 3, 5)) + 1j * rng.normal(size=(2, 7, 3, 5)) for _ in "xg")
    angles = rng.uniform(0, 100, size=(2, 7, 1, 5)).astype(np.float32)

    def halves(z):
        return np.concatenate([z.real, z.imag, np.zeros((2, 7, 3, padding))], axis=-1)

    def loss(x):
        y = rotate(x, jnp.cos(angles[:, :, 0]), jnp.sin(angles[:, :, 0]))
        return jnp.sum(y * halves(g)), y

    dx, y = jax.grad(loss, has_aux=True)(jnp.float32(halves(pairs)))
    turn = np.exp(1j * angles.astype(np.float64))
    np.testing.assert_allclose(y, halves(pairs * turn), rtol=0, atol=2e-5)
    np.testing.assert_allclose(dx, halves(g / turn), rtol=0, atol=2e-5)


def test_rotary_embedding_by_a_product_is_exact_in_bfloat16(monkeypatch):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 64, 4, 128)), jnp.bfloat16)
    angles = rng.uniform(0, 8192, size=(3, 64, 64)).astype(np.float32)
    arguments = x, jnp.cos(angles), jnp.sin(angles)
    split = rotate(*arguments)
    on_tpu(monkeypatch)
    np.testing.assert_array_equal(rotate(*arguments), split)


@pytest.mark.parametrize("adapted", [False, True])
def test_parts_of_a_linear_map_are_those_of_its_output(adapted):
    """Padded with zeros, and with equal gradients."""
    rng = np.random.default_rng(2)
    x, g = jnp.float32(rng.normal(size=(6, 7))), rng.normal(size=(3, 6, 2, 8))
    linear = Linear([(7, None)], [(3, None), (2, None), (5, None)], bias=True, rngs=nnx.Rngs(0))
    linear.bias.set_value(jnp.float32(rng.normal(size=(3, 2, 5))))
    if adapted:
        factors = rng.normal(size=(4, 7)), rng.normal(size=(3, 2, 5, 4))
        params = [nnx.LoRAParam(jnp.float32(x), axes=(None,) * x.ndim) for x in factors]
        linear.adapter = Adapter(*params, 2.0)
    graph, params = nnx.split(linear)

    def parts(params, x):
        y = jnp.stack(nnx.merge(graph, params).split(x, 8))
        return jnp.sum(y * g), y

    def whole(params, x):
        y = jnp.moveaxis(nnx.merge(graph, params)(x), 1, 0)
        return jnp.sum(y * g[..., :5]), jnp.pad(y, ((0, 0),) * 3 + ((0, 3),))

    (ours, expected) = (jax.grad(f, (0, 1), has_aux=True)(params, x) for f in (parts, whole))
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_a_linear_map_ignores_padding_of_its_input():
    rng = np.random.default_rng(3)
    linear = Linear([(2, None), (5, None)], [(4, None)], bias=True, rngs=nnx.Rngs(0))
    x = jnp.float32(rng.normal(size=(6, 2, 8)))
    np.testing.assert_allclose(linear(x), linear(x[..., :5]), rtol=0, atol=2e-6)
