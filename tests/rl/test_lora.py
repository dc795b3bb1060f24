"""LoRA matches its equation and PEFT; only adapters are trained, and runs save them."""

import json
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import sharding
from mmsr1_jax.models.layers import Adapter, Linear
from mmsr1_jax.rl import lora, packing
from mmsr1_jax.scripts import merge, random_policy
from mmsr1_jax.training import metrics, train_utils
from mmsr1_jax.training.workdir import Workdir
from tests.programs import ROOT, run
from tests.reference import (
    SMALL,
    AutoModelForImageTextToText,
    over_families,
    torch,
    torch_logits,
    torch_model,
)
from tests.rl.learners import (
    CONFIG,
    SHAPE,
    assert_same_update,
    flat,
    learned_config,
    loss_function,
    make_learner,
    make_samples,
    metrics_and_moments,
    off_policy_batches,
    torch_loss,
)
from tests.train_runs import new_run_command, train_command, write_questions


def all_targets(config):
    return dict(lora_rank=3, lora_alpha=6.0, lora_targets=lora.targets_of(config))


ALL_TARGETS = all_targets(CONFIG)
SOME_TARGETS = ALL_TARGETS | dict(lora_targets=("q", "out", "down"))


def randomised(learner, seed=0):
    """Add noise to the adapters of the learner, in place, so that they have an effect."""
    rng = np.random.default_rng(seed)

    def random(x):
        noise = rng.normal(0, 0.1, x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + noise, x.sharding)

    learner.trained = jax.tree.map(random, learner.trained)
    return learner


def adapted_policy(learner):
    """Return the policy with separate adapters."""
    return nnx.merge(learner._graph, learner.trained, learner.frozen)


@pytest.fixture(scope="module")
def config(request):
    return learned_config(request)


@pytest.fixture(scope="module")
def learner(config):
    return randomised(make_learner(config, max_grad_norm=0.0, **all_targets(config)))


@pytest.fixture
def one_device():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def test_an_adapted_linear_map_matches_its_equation():
    """y = x W^T + b + alpha/r (x A^T) B^T with separate axes for heads, in float64."""
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(2, 5, 7, 3)), rng.normal(size=(2, 5))
    A, B = rng.normal(size=(4, 7, 3)), rng.normal(size=(2, 5, 4))
    x, g = rng.normal(size=(6, 11, 7, 3)), rng.normal(size=(6, 11, 2, 5))
    linear = Linear([(7, None), (3, None)], [(2, None), (5, None)], bias=True, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.float32(W))
    linear.bias.set_value(jnp.float32(b))

    factors = [nnx.LoRAParam(jnp.float32(x), axes=(None,) * x.ndim) for x in (A, B)]
    linear.adapter = Adapter(*factors, 8 / 4)
    graph, factors, base = nnx.split(linear, nnx.LoRAParam, ...)

    def loss(factors, x):
        y = nnx.merge(graph, factors, base)(x)
        return jnp.sum(y * g), y

    with jax.default_matmul_precision("highest"):
        (actual, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(factors, jnp.float32(x))
    dA, dB = (actual["adapter"][name].get_value() for name in "ab")
    merged = W + 2 * np.einsum("nhr,rij->nhij", B, A)
    dW = np.einsum("btnh,btij->nhij", g, x)  # gradient of `merged`
    for actual, expected in (
        (y, np.einsum("btij,nhij->btnh", x, merged) + b),
        (dx, np.einsum("btnh,nhij->btij", g, merged)),
        (dA, 2 * np.einsum("nhr,nhij->rij", B, dW)),
        (dB, 2 * np.einsum("nhij,rij->nhr", dW, A)),
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_new_adapters_do_not_change_the_policy():
    plain, learner = make_learner(CONFIG), make_learner(CONFIG, **ALL_TARGETS)
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    for actual, expected in zip(learner.logprobs(batches), plain.logprobs(batches), strict=True):
        np.testing.assert_array_equal(actual, expected)
    expected_params = flat(plain.params)
    for name, value in flat(learner.params).items():
        np.testing.assert_array_equal(value, expected_params.pop(name), err_msg=name)
    assert not expected_params
    a = learner.trained["text"]["layers"]["mlp"]["down"]["adapter"]["a"].get_value()
    assert a.shape == (3, 3, 256) and np.std(a) == pytest.approx(256**-0.5, rel=0.1)
    assert len({float(x.reshape(-1)[0]) for x in jax.tree.leaves(learner.trained)}) == 12 + 1


@over_families("config", proof=True)
def test_merged_adapters_give_the_same_policy(config, learner):
    batches = packing.pack(make_samples(config), config, SHAPE)
    graph, params = nnx.split(learner.model())
    assert "adapter" not in str(graph)
    plain = make_learner(config)
    plain.trained = params
    for actual, expected, before in zip(
        plain.logprobs(batches),
        learner.logprobs(batches),
        make_learner(config).logprobs(batches),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
        assert np.abs(actual - before).max() > 0.1


def test_only_adapters_are_trained():
    learner = make_learner(CONFIG, **SOME_TARGETS)
    paths = [*flat(learner.trained), *flat(learner.optimizer)]
    assert len(paths) == 3 * 2 * 3 + 1  # A and B of three maps, with two moments, and the count
    assert sum("adapter" in path for path in paths) == len(paths) - 1
    before, adapters, params = flat(learner.frozen), flat(learner.trained), flat(learner.params)
    reference = learner.snapshot()
    batches = off_policy_batches(learner, make_samples(CONFIG))
    first = learner.logprobs(batches)
    for _ in range(2):  # A has no gradient while B is zero
        assert learner.update(batches, 1e-2)["finite"] == 1
    for name, value in flat(learner.frozen).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    for name, value in flat(learner.trained).items():
        assert np.abs(value - adapters[name]).max() > 1e-3, name
    changed = {
        name for name, value in flat(learner.params).items() if (value != params[name]).any()
    }
    assert {re.findall(r"'(\w+)'", name)[-2] for name in changed} == {"q", "out", "down"}
    # The initial adapters represent the initial policy.
    for actual, expected in zip(learner.logprobs(batches, reference), first, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_frozen_parameters_stay_in_bfloat16(tiny_dir, one_device):
    config = settings.Config()
    config.model.dtype = "bfloat16"
    config.update.lora_rank = 4
    model = train_utils.load_policy(config, str(tiny_dir), one_device)
    learner = train_utils.Learner(model, loss_function, config.update, one_device)
    assert {x.dtype.name for x in jax.tree.leaves(learner.frozen)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(learner.trained)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(learner.params)} == {"bfloat16"}
    kernels = {x.shape for x in jax.tree.leaves(learner.frozen)}
    assert kernels.isdisjoint(
        x.shape for x in jax.tree.leaves((learner.trained, learner.optimizer))
    )


@pytest.mark.proof
def test_gradients_never_materialise_the_product_of_the_factors():
    """In the compiled program, no matrix product has the size of a kernel, in any order of axes."""
    batches = packing.pack(make_samples(CONFIG), CONFIG, packing.RowShape(1, 130, 10))

    def products(**update):
        text = make_learner(CONFIG, **update).lower("gradient", batches[0]).compile().as_text()
        actual = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
        return {tuple(sorted(int(n) for n in sizes.split(",") if n != "1")) for sizes in actual}

    D, F = CONFIG.text.hidden_size, CONFIG.text.intermediate_size
    assert (D, F) in products()  # the search finds such a product
    assert (D, F) not in products(**ALL_TARGETS)


@pytest.mark.proof
def test_eight_devices_equal_one():
    batches = packing.RowShape(8, 128, 16)
    learner = make_learner(CONFIG, max_grad_norm=0.0, **ALL_TARGETS)
    other = make_learner(CONFIG, sharding.make_mesh(1, 4, 2), max_grad_norm=0.0, **ALL_TARGETS)
    for name, value in flat(other.trained).items():
        np.testing.assert_array_equal(value, flat(learner.trained)[name])  # the same initial values
    learner, other = randomised(learner), randomised(other)
    assert_same_update(
        metrics_and_moments(other, off_policy_batches(other, make_samples(CONFIG), batches)),
        metrics_and_moments(learner, off_policy_batches(learner, make_samples(CONFIG))),
    )
    expected_params = flat(learner.params)
    for name, value in flat(other.params).items():
        np.testing.assert_allclose(value, expected_params[name], rtol=0, atol=1e-5)

    def part(variable):
        return variable.get_value().sharding.shard_shape(variable.get_value().shape)

    gate = other.trained["text"]["layers"]["mlp"]["gate"]["adapter"]
    assert part(gate["a"]) == (3, 3, 128 // 4) and part(gate["b"]) == (3, 256 // 2, 3)
    merged = other.params["text"]["layers"]["mlp"]["gate"]["kernel"]
    assert part(merged) == (3, 256 // 2, 128 // 4)


def peft_model(learner, directory, **keywords):
    """Return the policy in torch, with our adapters as PEFT reads them."""
    peft = pytest.importorskip("peft", reason="the reference implementation of LoRA")
    plain = nnx.merge(learner._plain_graph, nnx.state(adapted_policy(learner), is_base))
    config = learner.model().config
    lora.save(learner.trained, directory, config, alpha=6.0, source="base")
    return peft.PeftModel.from_pretrained(torch_model(plain), str(directory), **keywords)


def is_base(path, value):
    return not isinstance(value, nnx.LoRAParam)


@over_families("config", proof=False)
def test_peft_reads_our_adapters(config, learner, tmp_path):
    torch_policy = peft_model(learner, tmp_path / "adapter")
    merged = torch_model(learner.model())
    for sample in make_samples(config, 3):
        expected = torch_logits(torch_policy, sample.prompt, config)
        np.testing.assert_allclose(
            torch_logits(merged, sample.prompt, config), expected, rtol=0, atol=1e-4
        )
    total = sum(p.numel() for name, p in torch_policy.named_parameters() if "lora_" in name)
    assert total == sum(x.size for x in jax.tree.leaves(learner.trained))
    assert all(p.abs().max() > 0 for name, p in torch_policy.named_parameters() if "lora_" in name)


@pytest.mark.proof
@over_families("config", proof=True)
def test_updates_equal_torch(config, tmp_path):
    learner = randomised(make_learner(config, max_grad_norm=0.5, **all_targets(config)))
    samples = make_samples(config, seed=2)
    torch_policy = peft_model(learner, tmp_path / "start", is_trainable=True)
    trained = {
        name.replace(".default", ""): p
        for name, p in torch_policy.named_parameters()
        if "lora_" in name
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.1)
    batches = off_policy_batches(learner, samples)
    _, own = torch_loss(torch_policy, samples, None, None)

    def ours(state, name):
        lora.save(state, tmp_path / name, config, alpha=6.0, source="base")
        return safetensors.numpy.load_file(tmp_path / name / lora.WEIGHTS)

    with torch.enable_grad():
        for step in range(3):
            optimizer.zero_grad()
            expected, _ = torch_loss(torch_policy, samples, own, own)
            expected.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
            optimizer.step()
            actual = learner.update(batches, 1e-4)
            assert actual["loss"] == pytest.approx(expected.item(), rel=1e-4), step
            assert actual["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
            if step == 0:  # Adam's first moment is a tenth of the gradient
                gradients = ours(learner.optimizer[1].mu, "gradients")
                assert gradients.keys() == trained.keys()
                for name, p in trained.items():
                    g = p.grad.numpy()
                    np.testing.assert_allclose(
                        10 * gradients[name], g, rtol=0, atol=1e-4 * np.abs(g).max(), err_msg=name
                    )
    actual = ours(learner.trained, "end")
    errors = {name: np.abs(actual[name] - p.detach().numpy()).max() for name, p in trained.items()}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


@pytest.mark.proof
def test_merge_equals_the_saved_policy(tiny_dir, tmp_path):
    config = settings.Config(update=settings.Update(**ALL_TARGETS))
    mesh = sharding.make_mesh(1, 4, 2)
    model = train_utils.load_policy(config, str(tiny_dir), mesh)
    learner = randomised(train_utils.Learner(model, loss_function, config.update, mesh))
    train_utils.save_policy(learner, config, str(tiny_dir), Workdir(tmp_path))
    merge.merge(str(tiny_dir), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    actual = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    expected = safetensors.numpy.load_file(tmp_path / "policy" / "model.safetensors")
    start = safetensors.numpy.load_file(tiny_dir / "model.safetensors")
    assert actual.keys() == expected.keys() == start.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-6, err_msg=name)
        trained = re.search(r"(_proj|qkv|attn.proj)\.weight$", name) is not None
        assert (value != start[name]).any() == trained, name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompt = make_samples(random_policy.CONFIG, 1)[0].prompt
    np.testing.assert_allclose(
        torch_logits(loaded.eval(), prompt, random_policy.CONFIG),
        torch_logits(torch_model(learner.model()), prompt, random_policy.CONFIG), rtol=0, atol=1e-4,
    )  # fmt: skip


@pytest.mark.proof
def test_a_run_with_adapters_resumes(tmp_path):
    workdir, questions = tmp_path / "run", write_questions(tmp_path)
    flags = ["lora_rank=4", "learning_rate=1e-2"]
    flags = ["--config.run.validate_every=0", *(f"--config.update.{flag}" for flag in flags)]
    process = run(new_run_command(workdir, questions, *flags, "--config.run.steps=1"))
    assert process.returncode == 0, process.stderr[-3000:]
    process = run(train_command(workdir, "--config.run.steps=2"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resuming after step 1" in process.stderr
    first, second = metrics.read(workdir / "metrics.jsonl")
    for line in (first, second):  # adapters are merged in the engine, separate in the trainer
        assert line["update/rollout_logprob_diff_abs"] < 1e-4 and line["update/gradient_norm"] > 0
    assert first["update/kl"] == pytest.approx(0, abs=1e-9) and second["update/kl"] > 1e-7
    assert (workdir / "adapter" / lora.CONFIG).is_file() and (workdir / "policy").is_dir()


def test_invalid_adapters_are_rejected(learner, tmp_path):
    lora.save(learner.trained, tmp_path, CONFIG, alpha=6.0, source="base")
    read, scale = lora.load(tmp_path, CONFIG)
    assert scale == 2.0
    for name, value in flat(read).items():
        np.testing.assert_array_equal(value, flat(learner.trained)[name])
    weights, config_path = tmp_path / lora.WEIGHTS, tmp_path / lora.CONFIG
    tensors, raw = safetensors.numpy.load_file(weights), json.loads(config_path.read_text())

    # The names of the released files are read too.
    released = {name.replace("model.language_model.", "model."): x for name, x in tensors.items()}
    safetensors.numpy.save_file(released, weights)
    assert flat(lora.load(tmp_path, CONFIG)[0]).keys() == flat(read).keys()

    def error(match, tensors=tensors, **fields):
        safetensors.numpy.save_file(tensors, weights)
        config_path.write_text(json.dumps(raw | fields))
        with pytest.raises(lora.AdapterError, match=match):
            lora.load(tmp_path, CONFIG)

    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
    error(f"{name} is missing", {k: v for k, v in tensors.items() if k != name})
    error("w.lora_A.weight belongs to no linear map", tensors | {"w.lora_A.weight": np.zeros(2)})
    error(r"has shape \[2\], the policy and the rank need", tensors | {name: np.zeros(2)})
    error("use_dora=True: only plain LoRA", use_dora=True)
    error("peft_type='IA3' with r=3 is not LoRA", peft_type="IA3")
    error("the policy and the rank need", r=5)
    weights.write_bytes(b"no")
    with pytest.raises(lora.AdapterError, match="truncated or not safetensors"):
        lora.load(tmp_path, CONFIG)
    config_path.unlink()
    with pytest.raises(lora.AdapterError, match="adapter_config.json: not the configuration"):
        lora.load(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="is the same directory as --model"):
        merge.merge(str(tmp_path), "anything", str(tmp_path / "."))


def test_invalid_settings_are_rejected():
    def error(match, **update):
        with pytest.raises(settings.ConfigError, match=match):
            settings.validate(settings.Config(update=settings.Update(**update)))

    error("'o' is not one of q, k, v, out, gate, up, down, vision.qkv", lora_targets=("o",))
    error("lora_targets is empty, with lora_rank=2", lora_rank=2, lora_targets=())
    error("update.lora_alpha=0.0 must be over 0", lora_rank=2, lora_alpha=0.0)
    error("update.lora_rank=-1 must be at least 0", lora_rank=-1)
    error("'vision.qkv' is frozen by update.freeze_vision", lora_rank=2, freeze_vision=True,
          lora_targets=("q", "vision.qkv"))  # fmt: skip
    get_config = runpy.run_path(str(ROOT / "configs" / "qwen7b_lora.py"))["get_config"]
    for variant in ("paper", "script"):
        assert settings.validate(get_config(variant)).update.lora_rank > 0


def test_targets_that_the_policy_does_not_have_are_rejected():
    """The feed-forward layers of the two towers have different linear maps."""
    config = SMALL["qwen3_vl"]
    with pytest.raises(UserError, match="has no linear map 'vision.gate', only q, k, v, out"):
        make_learner(config, lora_rank=2, lora_targets=("q", "vision.gate"))
    new = set(lora.targets_of(config)) - set(lora.targets_of(CONFIG))
    assert new == {"vision.fc1", "vision.fc2"}
