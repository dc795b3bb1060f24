"""LoRA: against its equation and against PEFT; what is trained, and what a run leaves behind."""

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
from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl.layers import Adapter, Linear
from mmsr1_jax.rl import lora, packing
from mmsr1_jax.scripts import merge, random_policy
from mmsr1_jax.training import metrics, train_utils
from tests.programs import ROOT, run
from tests.reference import (
    Qwen2_5_VLForConditionalGeneration,
    torch,
    torch_logits,
    torch_model,
)
from tests.test_update import (
    CONFIG,
    SHAPE,
    after,
    assert_same,
    flat,
    learner,
    make_samples,
    prepared,
    torch_loss,
)
from tests.train_runs import new_run_command, train_command, write_questions

EVERYWHERE = dict(lora_rank=3, lora_alpha=6.0, lora_targets=tuple(lora.TARGETS))
TEXT = EVERYWHERE | dict(lora_targets=("q", "out", "down"))


def moved(one, seed=0):
    """The learner, with adapters that do something."""
    rng = np.random.default_rng(seed)

    def random(x):
        noise = rng.normal(0, 0.1, x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + noise, x.sharding)

    one.trained = jax.tree.map(random, one.trained)
    return one


def adapted(one):
    """The policy with its adapters beside it."""
    return nnx.merge(one._graph, one.trained, one.frozen)


@pytest.fixture(scope="module")
def one():
    return moved(learner(CONFIG, max_grad_norm=0.0, **EVERYWHERE))


@pytest.fixture
def one_device():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def test_a_linear_map_and_its_gradients():
    """y = x W^T + b + alpha/r (x A^T) B^T with heads as axes of their own, in float64."""
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(2, 5, 7, 3)), rng.normal(size=(2, 5))
    A, B = rng.normal(size=(4, 7, 3)), rng.normal(size=(2, 5, 4))
    x, g = rng.normal(size=(6, 11, 7, 3)), rng.normal(size=(6, 11, 2, 5))
    linear = Linear([(7, None), (3, None)], [(2, None), (5, None)], bias=True, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.float32(W))
    linear.bias.set_value(jnp.float32(b))

    linear.adapter = Adapter(nnx.LoRAParam(jnp.float32(A)), nnx.LoRAParam(jnp.float32(B)), 8 / 4)
    graph, factors, base = nnx.split(linear, nnx.LoRAParam, ...)

    def loss(factors, x):
        y = nnx.merge(graph, factors, base)(x)
        return jnp.sum(y * g), y

    with jax.default_matmul_precision("highest"):
        (found, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(factors, jnp.float32(x))
    dA, dB = (found["adapter"][name].get_value() for name in "ab")
    whole = W + 2 * np.einsum("nhr,rij->nhij", B, A)
    dW = np.einsum("btnh,btij->nhij", g, x)  # of the whole; the rest is the chain rule
    for found, wanted in (
        (y, np.einsum("btij,nhij->btnh", x, whole) + b),
        (dx, np.einsum("btnh,nhij->btij", g, whole)),
        (dA, 2 * np.einsum("nhr,nhij->rij", B, dW)),
        (dB, 2 * np.einsum("nhij,rij->nhr", dW, A)),
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_fresh_adapters_change_nothing():
    plain, one = learner(CONFIG), learner(CONFIG, **EVERYWHERE)
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    for found, wanted in zip(one.score(batches), plain.score(batches), strict=True):
        np.testing.assert_array_equal(found, wanted)
    expected = flat(plain.params)
    for name, value in flat(one.params).items():
        np.testing.assert_array_equal(value, expected.pop(name), err_msg=name)
    assert not expected
    a = one.trained["text"]["layers"]["mlp"]["down"]["adapter"]["a"].get_value()
    assert a.shape == (3, 3, 256) and np.std(a) == pytest.approx(256**-0.5, rel=0.1)
    assert len({float(x.reshape(-1)[0]) for x in jax.tree.leaves(one.trained)}) == 12 + 1


def test_merged_is_the_same_policy(one):
    batches = packing.pack(make_samples(CONFIG), CONFIG, SHAPE)
    graph, params = nnx.split(one.model())
    assert "adapter" not in str(graph)
    plain = learner(CONFIG)
    plain.trained = params
    for found, wanted, before in zip(
        plain.score(batches), one.score(batches), learner(CONFIG).score(batches), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
        assert np.abs(found - before).max() > 0.1


def test_only_adapters_are_trained():
    one = learner(CONFIG, **TEXT)
    paths = [*flat(one.trained), *flat(one.optimizer)]
    assert len(paths) == 3 * 2 * 3 + 1  # A and B of three maps, with two moments, and the count
    assert sum("adapter" in path for path in paths) == len(paths) - 1
    before, adapters, whole = flat(one.frozen), flat(one.trained), flat(one.params)
    reference = one.snapshot()
    batches = prepared(one, make_samples(CONFIG))
    first = one.score(batches)
    for _ in range(2):  # A has no gradient until B has moved
        assert one.update(batches, 1e-2)["finite"] == 1
    for name, value in flat(one.frozen).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    for name, value in flat(one.trained).items():
        assert np.abs(value - adapters[name]).max() > 1e-3, name
    changed = {name for name, value in flat(one.params).items() if (value != whole[name]).any()}
    assert {re.findall(r"'(\w+)'", name)[-2] for name in changed} == {"q", "out", "down"}
    # The adapters of the beginning are the policy of the beginning.
    for found, wanted in zip(one.score(batches, reference), first, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_no_float32_copy_of_the_policy(tiny_dir, one_device):
    config = settings.Config()
    config.model.dtype = "bfloat16"
    config.update.lora_rank = 4
    model = train_utils.load_policy(config, str(tiny_dir), one_device)
    one = train_utils.Learner(model, None, config.update, one_device)
    assert {x.dtype.name for x in jax.tree.leaves(one.frozen)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(one.trained)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(one.params)} == {"bfloat16"}
    kernels = {x.shape for x in jax.tree.leaves(one.frozen)}
    assert kernels.isdisjoint(x.shape for x in jax.tree.leaves((one.trained, one.optimizer)))


@pytest.mark.proof
def test_a_gradient_holds_no_product_of_the_factors():
    """In the compiled program no matrix product, however its axes lie, is as large as a kernel."""
    batches = packing.pack(make_samples(CONFIG), CONFIG, packing.RowShape(1, 130, 10))

    def products(**update):
        text = learner(CONFIG, **update).lower(batches[0]).compile().as_text()
        found = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
        return {tuple(sorted(int(n) for n in sizes.split(",") if n != "1")) for sizes in found}

    wide, inner = CONFIG.text.hidden_size, CONFIG.text.intermediate_size
    assert (wide, inner) in products()  # such a product is found where there is one
    assert (wide, inner) not in products(**EVERYWHERE)


@pytest.mark.proof
def test_eight_devices():
    batches = packing.RowShape(8, 128, 16)
    one = learner(CONFIG, max_grad_norm=0.0, **EVERYWHERE)
    other = learner(CONFIG, sharding.make_mesh(1, 4, 2), max_grad_norm=0.0, **EVERYWHERE)
    for name, value in flat(other.trained).items():
        np.testing.assert_array_equal(value, flat(one.trained)[name])  # the same first values
    one, other = moved(one), moved(other)
    assert_same(
        after(other, prepared(other, make_samples(CONFIG), batches)),
        after(one, prepared(one, make_samples(CONFIG))),
    )
    expected = flat(one.params)
    for name, value in flat(other.params).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)

    def part(variable):
        return variable.get_value().sharding.shard_shape(variable.get_value().shape)

    gate = other.trained["text"]["layers"]["mlp"]["gate"]["adapter"]
    assert part(gate["a"]) == (3, 3, 128 // 4) and part(gate["b"]) == (3, 256 // 2, 3)
    merged = other.params["text"]["layers"]["mlp"]["gate"]["kernel"]
    assert part(merged) == (3, 256 // 2, 128 // 4)


def peft_model(one, directory, **keywords):
    """The policy in torch, with our adapters as PEFT reads them."""
    peft = pytest.importorskip("peft", reason="the reference implementation of LoRA")
    plain = nnx.merge(one._plain_graph, nnx.state(adapted(one), _is_base))
    lora.save(one.trained, directory, CONFIG, alpha=6.0, source="base")
    return peft.PeftModel.from_pretrained(torch_model(plain), str(directory), **keywords)


def _is_base(path, value):
    return not isinstance(value, nnx.LoRAParam)


def test_peft_reads_our_adapters(one, tmp_path):
    theirs = peft_model(one, tmp_path / "adapter")
    merged = torch_model(one.model())
    for sample in make_samples(CONFIG, 3):
        wanted = torch_logits(theirs, sample.prompt, CONFIG)
        np.testing.assert_allclose(
            torch_logits(merged, sample.prompt, CONFIG), wanted, rtol=0, atol=1e-4
        )
    total = sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    assert total == sum(x.size for x in jax.tree.leaves(one.trained))
    assert all(p.abs().max() > 0 for name, p in theirs.named_parameters() if "lora_" in name)


def test_updates_equal_torch(tmp_path):
    one = moved(learner(CONFIG, max_grad_norm=0.5, **EVERYWHERE))
    samples = make_samples(CONFIG, seed=2)
    theirs = peft_model(one, tmp_path / "start", is_trainable=True)
    chosen = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name
    }
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-4, weight_decay=0.1)
    batches = prepared(one, samples)
    _, own = torch_loss(theirs, samples, None, None)

    def ours(state, name):
        lora.save(state, tmp_path / name, CONFIG, alpha=6.0, source="base")
        return safetensors.numpy.load_file(tmp_path / name / lora.WEIGHTS)

    with torch.enable_grad():
        for step in range(3):
            optimizer.zero_grad()
            wanted, _ = torch_loss(theirs, samples, own, own)
            wanted.backward()
            norm = torch.nn.utils.clip_grad_norm_(chosen.values(), 0.5)
            optimizer.step()
            found = one.update(batches, 1e-4)
            assert found["loss"] == pytest.approx(wanted.item(), rel=1e-4), step
            assert found["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
            if step == 0:  # Adam's first moment is a tenth of the gradient
                gradients = ours(one.optimizer[1].mu, "gradients")
                assert gradients.keys() == chosen.keys()
                for name, p in chosen.items():
                    g = p.grad.numpy()
                    np.testing.assert_allclose(
                        10 * gradients[name], g, rtol=0, atol=1e-4 * np.abs(g).max(), err_msg=name
                    )
    found = ours(one.trained, "end")
    worst = {name: np.abs(found[name] - p.detach().numpy()).max() for name, p in chosen.items()}
    assert max(worst.values()) <= 1e-5, max(worst, key=worst.get)


@pytest.mark.proof
def test_the_merge_command(tiny_dir, tmp_path):
    config = settings.Config(update=settings.Update(**EVERYWHERE))
    mesh = sharding.make_mesh(1, 4, 2)
    model = train_utils.load_policy(config, str(tiny_dir), mesh)
    one = moved(train_utils.Learner(model, None, config.update, mesh))
    train_utils.save_policy(one, config, str(tiny_dir), tmp_path)
    merge.merge(str(tiny_dir), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    found = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    wanted = safetensors.numpy.load_file(tmp_path / "policy" / "model.safetensors")
    start = safetensors.numpy.load_file(tiny_dir / "model.safetensors")
    assert found.keys() == wanted.keys() == start.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
        trained = re.search(r"(_proj|qkv|attn.proj)\.weight$", name) is not None
        assert (value != start[name]).any() == trained, name
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    prompt = make_samples(random_policy.CONFIG, 1)[0].prompt
    np.testing.assert_allclose(
        torch_logits(loaded.eval(), prompt, random_policy.CONFIG),
        torch_logits(torch_model(one.model()), prompt, random_policy.CONFIG), rtol=0, atol=1e-4,
    )  # fmt: skip


@pytest.mark.proof
def test_a_run_gone_on_with(tmp_path):
    workdir, questions = tmp_path / "run", write_questions(tmp_path)
    flags = ["lora_rank=4", "learning_rate=1e-2"]
    flags = ["--config.run.validate_every=0", *(f"--config.update.{flag}" for flag in flags)]
    done = run(new_run_command(workdir, questions, *flags, "--config.run.steps=1"))
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(train_command(workdir, "--config.run.steps=2"))
    assert done.returncode == 0 and "resuming after step 1" in done.stderr, done.stderr[-3000:]
    first, second = metrics.read(workdir / "metrics.jsonl")
    for line in (first, second):  # the engine has the adapters merged, the trainer has not
        assert line["update/rollout_logprob_diff_abs"] < 1e-4 and line["update/gradient_norm"] > 0
    assert first["update/kl"] == pytest.approx(0, abs=1e-9) and second["update/kl"] > 1e-7
    assert (workdir / "adapter" / lora.CONFIG).is_file() and (workdir / "policy").is_dir()


def test_adapters_that_cannot_be_read(one, tmp_path):
    lora.save(one.trained, tmp_path, CONFIG, alpha=6.0, source="base")
    read, scale = lora.load(tmp_path, CONFIG)
    assert scale == 2.0
    for name, value in flat(read).items():
        np.testing.assert_array_equal(value, flat(one.trained)[name])
    weights, described = tmp_path / lora.WEIGHTS, tmp_path / lora.CONFIG
    tensors, raw = safetensors.numpy.load_file(weights), json.loads(described.read_text())

    # The names of released files are understood too.
    released = {name.replace("model.language_model.", "model."): x for name, x in tensors.items()}
    safetensors.numpy.save_file(released, weights)
    assert flat(lora.load(tmp_path, CONFIG)[0]).keys() == flat(read).keys()

    def error(match, tensors=tensors, **fields):
        safetensors.numpy.save_file(tensors, weights)
        described.write_text(json.dumps(raw | fields))
        with pytest.raises(lora.AdapterError, match=match):
            lora.load(tmp_path, CONFIG)

    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
    error(f"{name} is missing", {k: v for k, v in tensors.items() if k != name})
    error("w.lora_A.weight is of no linear map", tensors | {"w.lora_A.weight": np.zeros(2)})
    error(r"has shape \[2\], the policy and the rank need", tensors | {name: np.zeros(2)})
    error("use_dora=True: only plain LoRA", use_dora=True)
    error("peft_type='IA3' with r=3 is not LoRA", peft_type="IA3")
    error("the policy and the rank need", r=5)
    weights.write_bytes(b"no")
    with pytest.raises(lora.AdapterError, match="truncated or not safetensors"):
        lora.load(tmp_path, CONFIG)
    described.unlink()
    with pytest.raises(lora.AdapterError, match="adapter_config.json: not the settings"):
        lora.load(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="is --model"):
        merge.merge(str(tmp_path), "anything", str(tmp_path / "."))


def test_settings():
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
