"""Every implementation of attention computes the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import attention as module
from mmsr1_jax.models import splash
from mmsr1_jax.models.attention import attention, choose
from tests.programs import array_sizes


@pytest.fixture(autouse=True)
def float32_products():
    """GPUs and TPUs use fewer bits for float32 by default, too few for the tolerances here."""
    with jax.default_matmul_precision("highest"):
        yield


def reference_attention(q, k, v, segment_ids, causal, prefix_ids=None):
    """softmax(q k^T / sqrt(H)) v in float64, one query at a time."""
    B, T, N, H = q.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            visible = segment_ids[b] == segment_ids[b, t]
            if prefix_ids is not None and prefix_ids[b, t]:
                visible |= segment_ids[b] == prefix_ids[b, t]
            if causal:
                visible &= np.arange(T) <= t
            scores = np.einsum("nh,snh->ns", q[b, t], k[b, visible]) / np.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, t] = np.einsum("ns,snh->nh", weights, v[b, visible])
    return out


def inputs(T, N=4, K=2, H=16, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, T, n, H)).astype(np.float32) for n in (N, K, K))
    ids = np.ones((2, T), np.int32)
    ids[0, T // 3 :] = 2
    ids[0, T // 2 :] = 3
    ids[1, -T // 4 :] = 0  # padding
    return q, k, v, ids


IMPLEMENTATIONS = {
    "xla": functools.partial(attention, implementation="xla"),
    "blockwise": functools.partial(attention, implementation="blockwise"),
    # The accelerators' kernels, run by Pallas' interpreter.
    "triton": functools.partial(module._triton, interpret=True),
    "splash": functools.partial(module._splash, interpret=True),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_packed_rows_match_the_formula(name, causal, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)  # several blocks, the last one not full
    T = 256 if name in ("triton", "splash") else 200
    q, k, v, ids = inputs(T, H=64 if name in ("triton", "splash") else 16)
    ours = IMPLEMENTATIONS[name](*map(jnp.asarray, (q, k, v, ids)), causal=causal)
    np.testing.assert_allclose(ours, reference_attention(q, k, v, ids, causal), atol=2e-5)


def with_prefixes(ids):
    """Return the prefix of each token: segments 2 and 3 of a row continue segment 1."""
    return np.where(ids > 1, 1, 0).astype(np.int32)


@pytest.mark.parametrize("name", ["xla", "blockwise", "splash"])
def test_segments_continue_a_prefix(name, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)
    q, k, v, ids = inputs(256, H=64)
    prefixes = with_prefixes(ids)
    # `attention` marks tokens without a prefix for the kernel.
    given = np.where(prefixes > 0, prefixes, -1) if name == "splash" else prefixes
    arrays = map(jnp.asarray, (q, k, v, ids, given))
    ours = np.asarray(IMPLEMENTATIONS[name](*arrays, causal=True))
    expected = reference_attention(q, k, v, ids, True, prefixes)
    np.testing.assert_allclose(ours[ids > 0], expected[ids > 0], atol=2e-5)


@pytest.mark.parametrize("name", ["blockwise", "splash"])
def test_gradients_with_prefixes_match_the_xla_implementation(name, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)
    q, k, v, ids = inputs(256, H=64)
    prefixes = with_prefixes(ids)
    weights = np.random.default_rng(1).normal(size=q.shape) * (ids != 0)[..., None, None]

    def gradient(implementation, prefixes):
        def loss(q, k, v):
            arrays = (q, k, v, jnp.asarray(ids), jnp.asarray(prefixes))
            return (implementation(*arrays, causal=True) * weights).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, (q, k, v)))

    marked = np.where(prefixes > 0, prefixes, -1) if name == "splash" else prefixes
    ours = gradient(IMPLEMENTATIONS[name], marked)
    for a, b in zip(ours, gradient(IMPLEMENTATIONS["xla"], prefixes), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def packed_rows(T, lengths):
    """Return ids and prefixes of a row: per list of lengths a prompt and segments that continue it.

    A list of one length is a segment by itself; the rest of the row is padding.
    """
    ids, prefixes = np.zeros((2, 1, T), np.int32)
    start, segment = 0, 0
    for cluster in lengths:
        prompt = segment + 1
        for length in cluster:
            segment += 1
            ids[0, start : start + length] = segment
            prefixes[0, start : start + length] = prompt if segment > prompt else 0
            start += length
    return ids, prefixes


# Blocks of 128 tokens: some hold a part of one segment, some several, some only padding.
CLUSTERS = ([100, 60, 200], [40], [130, 90, 20, 30])


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.proof)])
def test_splash_visits_few_blocks_and_misses_none(causal):
    ids, prefixes = packed_rows(1024, CLUSTERS)
    q, k, v, _ = (x[:1] for x in inputs(1024, H=64))
    weights = np.random.default_rng(1).normal(size=q.shape) * (ids != 0)[..., None, None]

    def gradient(name, prefixes):
        def loss(q, k, v):
            arrays = (q, k, v, jnp.asarray(ids), jnp.asarray(prefixes))
            out = IMPLEMENTATIONS[name](*arrays, causal=causal)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    marked = np.where(prefixes > 0, prefixes, -1)
    (ours, out), (expected, expected_out) = gradient("splash", marked), gradient("xla", prefixes)
    assert np.isfinite(out).all()
    used = ids[0] > 0
    np.testing.assert_allclose(out[0, used], expected_out[0, used], atol=2e-5)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    for seen in (ids, prefixes):
        visited = np.asarray(
            splash.visible_blocks(*map(jnp.asarray, (seen[0], ids[0])), 128, causal=causal)
        )
        pairs = (seen[0][:, None] == ids[0]) & (seen[0] > 0)[:, None]
        pairs &= np.tri(1024, dtype=bool) if causal else True
        needed = pairs.reshape(8, 128, 8, 128).any(axis=(1, 3))
        assert (visited >= needed).all() and visited.sum() <= 1.2 * needed.sum()


@pytest.mark.parametrize("name", ["cudnn", "triton"])
def test_implementations_without_prefixes_refuse_them(name):
    q, k, v, ids = map(jnp.asarray, inputs(256, H=64))
    with pytest.raises(UserError, match=f"{name} has no segments that continue others"):
        attention(
            q, k, v, ids, ids, causal=True, implementation=name, single_segment=name == "cudnn"
        )


@pytest.mark.parametrize("name", ["blockwise", "triton", "splash"])
def test_gradients_match_the_xla_implementation(name, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)
    q, k, v, ids = inputs(200 if name == "blockwise" else 256, H=64)
    weights = np.random.default_rng(1).normal(size=q.shape) * (ids != 0)[..., None, None]

    def gradient(implementation):
        def loss(q, k, v):
            return (implementation(q, k, v, jnp.asarray(ids), causal=True) * weights).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (q, k, v)))

    for ours, expected in zip(
        gradient(IMPLEMENTATIONS[name]), gradient(IMPLEMENTATIONS["xla"]), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_blockwise_never_materialises_the_score_matrix(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64)
    T = 1024
    q, k, v, ids = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(T, N=1, K=1))

    def largest(implementation):
        def loss(q, k, v, ids):
            return attention(q, k, v, ids, causal=True, implementation=implementation).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, ids).compile()
        return max(array_sizes(compiled))

    assert largest("blockwise") < T * T / 2
    assert largest("xla") >= T * T  # `array_sizes` finds such an array


def test_auto_chooses_by_platform_and_length(monkeypatch):
    def choose_on(platform, *args):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        return choose("auto", *args)

    bf16 = jnp.dtype(jnp.bfloat16)
    assert choose_on("cpu", 512, bf16, True) == "xla"
    assert choose_on("cpu", 8192, bf16, True) == "blockwise"
    assert choose_on("gpu", 8192, bf16, True) == "cudnn"
    assert choose_on("gpu", 8192, bf16, False) == "triton"
    assert choose_on("gpu", 8100, bf16, False) == "blockwise"
    assert choose_on("gpu", 8192, jnp.dtype(jnp.float32), True) == "blockwise"
    assert choose_on("tpu", 8192, bf16, False) == "splash"
    assert choose_on("tpu", 8190, bf16, False) == "blockwise"


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16])
def test_prompts_are_shared_where_the_chosen_implementation_can(dtype, monkeypatch):
    def supports_on(platform, keys):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        return module.supports_prefixes("auto", keys, dtype)

    assert supports_on("tpu", 8192) and supports_on("cpu", 8192) and supports_on("gpu", 512)
    assert not supports_on("gpu", 8192)
    assert not module.supports_prefixes("triton", 8192, dtype)


def test_unsupported_rows_and_unknown_names_are_rejected():
    with pytest.raises(UserError, match="triton needs rows of a multiple of 64 tokens, not 4100"):
        choose("triton", 4100, jnp.bfloat16, False)
    with pytest.raises(UserError, match="packed segments"):
        choose("cudnn", 4096, jnp.bfloat16, False)
    with pytest.raises(UserError, match="'flash' is not one of"):
        choose("flash", 4096, jnp.bfloat16, False)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_matches_the_formula(causal):
    q, k, v, _ = map(jnp.asarray, inputs(2048, H=64))
    ids = np.ones((2, 2048), np.int32)
    ids[1, 1500:] = 0
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    ours = attention(*half, ids, causal=causal, single_segment=True, implementation="cudnn")
    expected = attention(q, k, v, ids, causal=causal, implementation="xla")
    mask = ids[..., None, None] != 0
    np.testing.assert_allclose(ours * mask, expected * mask, atol=2e-2)
