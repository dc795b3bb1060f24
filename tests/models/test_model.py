"""The policy computes the same function as `transformers`/torch with the same random weights."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmsr1_jax.models import checkpoint
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.models.output_head import token_statistics
from mmsr1_jax.processing.batching import Bucket, make_rows
from mmsr1_jax.scripts import random_policy
from tests import reference
from tests.programs import array_sizes
from tests.reference import SMALL, random_conversation, torch, torch_logits, variant

BUCKET = Bucket(length=192, windows=12, rows=2)


CONFIGS = {
    "gqa 4:1, untied": random_policy.CONFIG,
    "gqa 8:1, tied": variant(num_kv_heads=1, tie_embeddings=True),
    "gqa 1:1, untied": variant(num_kv_heads=8),
    "qwen3, gqa 4:1, untied": SMALL["qwen3_vl"],
    "qwen3, gqa 8:1, tied": variant("qwen3_vl", num_kv_heads=1, tie_embeddings=True),
    "qwen3, gqa 1:1, untied": variant("qwen3_vl", num_kv_heads=8),
}
PLAIN = ["gqa 4:1, untied", "qwen3, gqa 4:1, untied"]  # one of each family

# In merged tokens. Windows are 4 x 4, so few of these images are a multiple of a window.
LAYOUTS = {
    "no image": [150],
    "one image": [9, (5, 7), 30],
    "three images of odd sizes": [3, (1, 9), 2, (5, 3), 11, (7, 6), 20],
    "image first and last": [(2, 3), 5, (4, 4)],
    "two frames": [9, (3, 5, 2), 30],
    "image in a second user turn": [40, (3, 5), 25, 30, (6, 2), 8],
}


@functools.cache
def models(name):
    model = random_policy.random_model(CONFIGS[name], seed=3)
    return model, reference.torch_model(model)


@functools.cache
def program(name):
    graph, _ = nnx.split(models(name)[0])

    @jax.jit
    def logits_and_logprobs(params, rows):
        model = nnx.merge(graph, params)
        hidden, _ = model(rows)
        return model.logits(hidden), model.token_logprobs(rows)

    return logits_and_logprobs


def jitted(name, params=None):
    params = nnx.split(models(name)[0])[1] if params is None else params
    return functools.partial(program(name), params)


def rows_of(conversations, config, bucket=BUCKET):
    return make_rows(conversations, bucket, config, config.image_token_id)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.proof] if "1:1" in name else []) for name in CONFIGS],
)
def test_logits_equal_torch(name, layout):
    model, torch_model = models(name)
    prompt = random_conversation(np.random.default_rng(5), model.config, LAYOUTS[layout])
    ours, logprobs = jitted(name)(rows_of([[prompt]], model.config))
    theirs = torch_logits(torch_model, prompt, model.config)
    T = len(prompt.tokens)
    assert theirs.std() > 0.2  # the logits are not nearly constant
    np.testing.assert_allclose(ours[0, :T], theirs, atol=2e-4, rtol=0)
    expected = torch.log_softmax(torch.tensor(theirs), -1)[:-1]
    expected = expected.gather(-1, torch.tensor(prompt.tokens[1:, None], dtype=torch.long))[:, 0]
    np.testing.assert_allclose(logprobs[0, 1:T], expected, atol=2e-4, rtol=0)
    assert (np.asarray(logprobs[0, T:]) == 0).all() and logprobs[0, 0] == 0


@pytest.mark.parametrize("name", PLAIN)
def test_the_tolerance_distinguishes_linear_positions_from_mrope(name):
    model, torch_model = models(name)
    prompt = random_conversation(np.random.default_rng(5), model.config, LAYOUTS["one image"])
    inputs = reference.torch_inputs(prompt, model.config)
    T = len(prompt.tokens)
    inputs["position_ids"] = torch.arange(T).expand(3, 1, T)
    linear = torch_model(**inputs).logits[0].numpy()
    mrope = torch_logits(torch_model, prompt, model.config)
    assert np.abs(linear - mrope).max() > 2e-3


@pytest.mark.parametrize("part", ["deepstack", "position_embedding", "q_norm"])
def test_the_tolerance_distinguishes_a_missing_part(part):
    """Without DeepStack's features, learned positions or the norm of queries, logits differ."""
    name = "qwen3, gqa 4:1, untied"
    model, torch_model = models(name)
    prompt = random_conversation(np.random.default_rng(5), model.config, LAYOUTS["one image"])
    params = nnx.split(nnx.clone(model))[1]
    if part == "deepstack":
        kernel = params["vision"]["deepstack"]["fc2"]["kernel"]
    elif part == "position_embedding":
        kernel = params["vision"]["position_embedding"]
    else:
        kernel = params["text"]["layers"]["attention"]["q_norm"]["scale"]
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    changed = jitted(name, params)(rows_of([[prompt]], model.config))[0][0, : len(prompt.tokens)]
    theirs = torch_logits(torch_model, prompt, model.config)
    assert np.abs(changed - theirs).max() > 2e-3


@pytest.mark.parametrize("name", PLAIN)
def test_packed_rows_equal_separate_rows(name):
    model, _ = models(name)
    rng = np.random.default_rng(11)
    prompts = [
        random_conversation(rng, model.config, layout)
        for layout in ([20, (3, 5), 7], [31], [(2, 2), 9, (1, 3), 4], [50])
    ]
    packed = rows_of([prompts[:3], prompts[3:]], model.config)
    logits, logprobs = jitted(name)(packed)
    for row, column, prompt in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 3)):
        start = sum(len(p.tokens) for p in prompts[:column]) if row == 0 else 0
        alone, alone_logprobs = jitted(name)(rows_of([[prompts[prompt]]], model.config))
        T = len(prompts[prompt].tokens)
        np.testing.assert_allclose(logits[row, start : start + T], alone[0, :T], atol=1e-4, rtol=0)
        np.testing.assert_allclose(
            logprobs[row, start : start + T], alone_logprobs[0, :T], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    "name",
    [
        *PLAIN,
        pytest.param("gqa 8:1, tied", marks=pytest.mark.proof),
        pytest.param("qwen3, gqa 8:1, tied", marks=pytest.mark.proof),
    ],
)
def test_gradients_equal_torch(name):
    """Gradients of a weighted token loss with respect to every parameter of both towers."""
    model, torch_model = models(name)
    config = model.config
    rng = np.random.default_rng(2)
    prompt = random_conversation(rng, config, [12, (5, 7), 30, (3, 3), 17])
    T = len(prompt.tokens)
    weights = rng.normal(size=T - 1).astype(np.float32)
    rows = rows_of([[prompt]], config)
    graph, params = nnx.split(model)

    @jax.jit
    def gradient(params):
        def loss(params):
            return (nnx.merge(graph, params).token_logprobs(rows)[0, 1:T] * weights).sum()

        return jax.grad(loss)(params)

    ours = reference.named_tensors(nnx.merge(graph, gradient(params)))
    with torch.enable_grad():
        torch_model.zero_grad()
        logits = torch_model(**reference.torch_inputs(prompt, config)).logits[0]
        logprobs = torch.log_softmax(logits, -1)[:-1]
        chosen = logprobs.gather(-1, torch.tensor(prompt.tokens[1:, None], dtype=torch.long))
        (chosen[:, 0] * torch.tensor(weights)).sum().backward()
    theirs = {k: p.grad.numpy() for k, p in torch_model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for key, expected in theirs.items():
        norm = np.linalg.norm(expected)
        assert norm > 0, key
        assert np.linalg.norm(ours[key] - expected) <= 1e-3 * norm, key


@pytest.mark.proof
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_remat_and_attention_give_the_same_gradients(config):
    rng = np.random.default_rng(2)
    rows = rows_of([[random_conversation(rng, config, [12, (5, 7), 30])]], config)

    def gradient(**keywords):
        graph, params = nnx.split(random_policy.random_model(config, seed=3, **keywords))

        @jax.jit
        def run(params):
            return jax.grad(lambda p: nnx.merge(graph, p).token_logprobs(rows).sum())(params)

        return jax.tree.leaves(run(params))

    plain = gradient()
    for keywords in ({"remat": "full", "attention": "blockwise"}, {"remat": "dots"}):
        for a, b in zip(plain, gradient(**keywords), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-4 * float(jnp.abs(a).max()), rtol=0)


def test_stronger_remat_uses_less_memory():
    config = variant(num_layers=8)
    rows = rows_of([[]], config, Bucket(length=128, windows=0, rows=1))
    memory = {}
    for remat in ("none", "dots", "full"):
        graph, params = nnx.split(checkpoint.abstract_model(config, remat=remat))

        def loss(params, rows, graph=graph):
            return nnx.merge(graph, params).token_logprobs(rows).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, rows).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["none"] > 1.2 * memory["dots"] and memory["dots"] > 1.2 * memory["full"], memory


def test_bfloat16_logits_are_not_rounded():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 64, 256)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(2048, 256)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 2048, (1, 64)))
    half = token_statistics(hidden, table, targets, chunk=16)[0]
    wide = [x.astype(jnp.float32) for x in (hidden, table)]
    exact = token_statistics(*wide, targets, chunk=16)[0]
    np.testing.assert_allclose(half, exact, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk, vocabulary", [(21, 100), (8, 100), (2, 97)])
def test_token_statistics_and_their_gradients_equal_torch(temperature, chunk, vocabulary):
    """In float64, with one block, with blocks, and with a vocabulary that has no divisor."""
    rng = np.random.default_rng(4)
    hidden, table = rng.normal(size=(2, 21, 32)), rng.normal(size=(vocabulary, 32))
    targets = rng.integers(0, vocabulary, (2, 21))
    weights = rng.normal(size=(2, 2, 21))
    inputs = [torch.tensor(x, requires_grad=True) for x in (hidden, table)]
    with torch.enable_grad():
        policy = torch.distributions.Categorical(logits=inputs[0] @ inputs[1].T / temperature)
        expected = [policy.log_prob(torch.tensor(targets)), policy.entropy()]
        sum((torch.tensor(w) * x).sum() for w, x in zip(weights, expected, strict=True)).backward()

    def weighted(hidden, table):
        statistics = token_statistics(
            hidden, table, jnp.asarray(targets), chunk=chunk, temperature=temperature
        )
        return sum((w * x).sum() for w, x in zip(weights, statistics, strict=True)), statistics

    narrow = [jnp.asarray(x, jnp.float32) for x in (hidden, table)]
    gradients, statistics = jax.grad(weighted, argnums=(0, 1), has_aux=True)(*narrow)
    for ours, theirs in zip(statistics, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)
    for ours, theirs in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_bfloat16_is_close_to_float32(name):
    config = CONFIGS[name]
    rng = np.random.default_rng(2)
    prompt = random_conversation(rng, config, [12, (5, 7), 30])
    rows = rows_of([[prompt]], config)

    model = random_policy.random_model(config, seed=3)
    keywords = dict(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    half_graph, _ = nnx.split(checkpoint.abstract_model(config, **keywords))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model))
    half = jax.jit(lambda p, r: nnx.merge(half_graph, p).token_logprobs(r))(params, rows)
    exact = jitted(name)(rows)[1]
    assert half.dtype == jnp.float32
    assert np.abs(np.asarray(half - exact)).max() < 0.1


def test_logprobs_never_materialise_tokens_by_vocabulary():
    B, T, V, D = 2, 256, 4096, 8
    hidden = jnp.zeros((B, T, D))
    table, targets = jnp.zeros((V, D)), jnp.zeros((B, T), jnp.int32)

    def loss(hidden, table, chunk):
        return token_statistics(hidden, table, targets, chunk=chunk)[0].sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    chunked = array_sizes(gradient.lower(hidden, table, 32).compile())
    assert max(chunked) < B * T * V / 4
    unchunked = array_sizes(gradient.lower(hidden, table, T).compile())
    assert max(unchunked) >= B * T * V  # `array_sizes` finds such an array


def lowered_gradient(layers):
    config = variant(num_layers=layers)
    graph, abstract = nnx.split(checkpoint.abstract_model(config))
    rows = rows_of([[]], config, Bucket(length=64, windows=0, rows=1))

    def loss(params):
        return nnx.merge(graph, params).token_logprobs(rows).sum()

    return jax.jit(jax.grad(loss)).lower(abstract)


def test_program_size_does_not_grow_with_depth():
    shallow, deep = (lowered_gradient(layers).as_text().count("\n") for layers in (4, 28))
    assert deep == shallow > 1000


@pytest.mark.proof
def test_compile_time_does_not_grow_with_depth():
    def compile_seconds(layers):
        seconds = []
        for _ in range(3):
            jax.clear_caches()
            start = time.perf_counter()
            lowered_gradient(layers).compile()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    compile_seconds(2)  # warm up
    assert compile_seconds(28) < 1.5 * compile_seconds(4)


@pytest.mark.parametrize(
    "name, count",
    [
        ("qwen2.5-vl-3b", 3754622976),
        ("qwen2.5-vl-7b", 8292166656),
        ("qwen2.5-vl-32b", 33452718336),
        ("qwen2.5-vl-72b", 73410777344),
        ("qwen3-vl-2b", 2127532032),
        ("qwen3-vl-4b", 4437815808),
        ("qwen3-vl-8b", 8767123696),
        ("qwen3-vl-32b", 33357390064),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    """In our model and in torch; the expected numbers are those of the released files."""
    config = PRESETS[name]
    leaves = jax.tree.leaves(nnx.state(checkpoint.abstract_model(config), nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count
    with torch.device("meta"):
        theirs = reference.torch_architecture(config)
    assert sum(p.numel() for p in theirs.parameters()) == count


@pytest.mark.parametrize("name", PLAIN)
def test_separate_layers_equal_stacked_ones(name):
    """Those of both towers, as engines on accelerators have them."""
    model, _ = models(name)
    prompt = random_conversation(np.random.default_rng(5), model.config, LAYOUTS["one image"])
    rows = rows_of([[prompt]], model.config)
    separate = nnx.clone(model)
    separate.unstack(vision=True)
    graph, params = nnx.split(separate)
    ours = jax.jit(lambda params, rows: nnx.merge(graph, params).token_logprobs(rows))(params, rows)
    np.testing.assert_allclose(ours, jitted(name)(rows)[1], atol=2e-5, rtol=0)
