"""Adapters of PEFT and other programs are merged as by PEFT, or rejected with a one-line error."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mmsr1_jax.models import checkpoint, sharding
from mmsr1_jax.rl import adapter_files, lora
from mmsr1_jax.scripts import random_policy
from tests.reference import torch, torch_logits, torch_model
from tests.rl.learners import make_samples

peft = pytest.importorskip("peft", reason="the reference implementation of LoRA")

CONFIG = random_policy.CONFIG
PROMPT = make_samples(CONFIG, 1)[0].prompt
QV = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def policy(tiny_dir):
    return load(tiny_dir)


def load(directory):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return checkpoint.load(directory, mesh=mesh)


def adapter(policy, directory, **fields):
    """Save an adapter with an effect. Return the policy's logits with it, as loaded by PEFT."""
    model = peft.get_peft_model(torch_model(policy), peft.LoraConfig(**(QV | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    loaded = peft.PeftModel.from_pretrained(torch_model(policy), str(directory))
    return torch_logits(loaded.eval(), PROMPT, CONFIG)


def merged(policy_dir, directory):
    model = load(policy_dir)
    lora.merge_into(model, *lora.load(directory, CONFIG))
    return torch_logits(torch_model(model), PROMPT, CONFIG)


def logprobs(logits):
    return torch.log_softmax(torch.as_tensor(np.asarray(logits)), -1).numpy()


MERGED = {
    "all linear maps": dict(target_modules="all-linear"),
    "chosen layers": dict(layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer of any list": dict(layers_to_transform=1, target_modules=["q_proj", "qkv"]),
    "a regular expression": dict(
        target_modules=r"model\.(language_model|visual)\..*\.(o_proj|attn\.proj)"
    ),
    "excluded modules": dict(
        target_modules=["down_proj", "gate_proj"], exclude_modules=r".*visual.*|.*layers\.1\..*"
    ),
    "a list of excluded modules": dict(
        target_modules=["mlp.0", "v_proj", "k_proj"], exclude_modules=["merger.mlp.0", "k_proj"]
    ),
    "ranks and scales by pattern": dict(
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 7, "v_proj": 2},
        alpha_pattern={r"^model\.language_model\.layers\.1\..*": 3, "v_proj": 0},
    ),
    "scales by the root of the rank": dict(use_rslora=True, rank_pattern={"v_proj": 9}),
    "the merger": dict(target_modules=["mlp.0", "merger.mlp.2"]),
    "another initialisation": dict(init_lora_weights="orthogonal", lora_dropout=0.3),
    "random initialisation, negative scale": dict(init_lora_weights=False, lora_alpha=-8),
    "initialisation from activations": dict(init_lora_weights="eva", eva_config=peft.EvaConfig()),
}
# The others are proofs.
QUICK = (
    "a regular expression",
    "ranks and scales by pattern",
    "random initialisation, negative scale",
)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[] if name in QUICK else pytest.mark.proof)
        for name, fields in MERGED.items()
    ],
)
def test_adapters_are_merged_as_by_peft(policy, tiny_dir, tmp_path, fields):
    expected = adapter(policy, tmp_path, **fields)
    np.testing.assert_allclose(
        logprobs(merged(tiny_dir, tmp_path)), logprobs(expected), rtol=0, atol=1e-5
    )
    base = torch_logits(torch_model(policy), PROMPT, CONFIG)
    assert np.abs(logprobs(expected) - logprobs(base)).max() > 1e-3


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    """Tensors and configuration of an adapter of both towers."""
    directory = tmp_path_factory.mktemp("adapter")
    adapter(policy, directory, target_modules="all-linear")
    tensors = safetensors.numpy.load_file(directory / lora.WEIGHTS)
    return tensors, json.loads((directory / lora.CONFIG).read_text())


def write(directory, tensors, config):
    safetensors.numpy.save_file(tensors, directory / lora.WEIGHTS)
    (directory / lora.CONFIG).write_text(json.dumps(config))


def flat(state):
    return {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(state)}


MEMORY = "base_model.model.model."
NAMES = {
    "older transformers": lambda n: n.replace(MEMORY + "language_model.", MEMORY).replace(
        MEMORY + "visual.", "base_model.model.visual."
    ),
    "the policy without its output head": lambda n: n.replace(MEMORY, "base_model.model."),
    "vLLM": lambda n: n.replace(
        MEMORY + "language_model.", "base_model.model.language_model.model."
    ).replace(MEMORY + "visual.", "base_model.model.visual."),
    "no wrapper": lambda n: n.removeprefix("base_model.model."),
    "with the name of the adapter": lambda n: n.replace(".weight", ".default.weight"),
    "single towers": lambda n: n.replace(MEMORY + "language_model.", "").replace(
        MEMORY + "visual.", ""
    ),
    "one tower renamed": lambda n: n.replace(MEMORY + "language_model.", MEMORY),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_naming_schemes_of_other_programs_are_read(saved, tmp_path, rename):
    tensors, config = saved
    write(tmp_path, tensors, config)
    expected = flat(lora.load(tmp_path, CONFIG)[0])
    renamed = {rename(name): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    write(tmp_path, renamed, config)
    actual = flat(lora.load(tmp_path, CONFIG)[0])
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_array_equal(value, expected[name])


def test_adapters_of_text_only_classes_are_read(saved, tmp_path):
    tensors, config = saved
    text = {name: value for name, value in tensors.items() if "visual" not in name}
    listed = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    write(tmp_path, text, config | {"target_modules": listed})
    assert {path[0] for path in flat(lora.load(tmp_path, CONFIG)[0])} == {"text"}


UNSUPPORTED = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"],
    "use_dora": [True],
    "alora_invocation_tokens": [[9, 60]],
    "modules_to_save": [["lm_head"]],
    "bias": ["all", "lora_only"],
    "lora_bias": [True],
    "trainable_token_indices": [[1, 2]],
    "target_parameters": [["experts.gate"]],
    "layer_replication": [[[0, 2], [1, 3]]],
    "megatron_config": [{"a": 1}],
    "use_qalora": [True],
    "kasa_config": [{"a": 1}],
    "a_field_of_next_year": [True, 0, "on"],
    "r": [0, -1, 2.5, "8", True, 10**9],
    "lora_alpha": ["8", None],
    "target_modules": [None, 3, "("],
    "layers_to_transform": [[0]],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": "4"}, {"q_proj": 5}],
    "alpha_pattern": [{"(": 3}, [1]],
    "exclude_modules": [["q_proj"], "["],
    "peft_type": ["LOHA", None],
}


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in UNSUPPORTED.items() for value in values]
)
def test_unsupported_fields_are_rejected_by_name(saved, tmp_path, field, value):
    tensors, config = saved
    if field == "layers_to_transform":  # rejected with a pattern of modules only
        config = config | {"target_modules": "all-linear"}
    write(tmp_path, tensors, config | {field: value})
    with pytest.raises(lora.AdapterError) as caught:
        lora.load(tmp_path, CONFIG)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    names = {"rank_pattern": "shape", "alpha_pattern": "", "exclude_modules": "", "r": "r"}
    if not (field in names or field == "target_modules"):
        assert field in message


def test_adapters_with_missing_or_extra_tensors_are_rejected(saved, tmp_path):
    tensors, config = saved
    first = next(name for name in sorted(tensors) if "layers.1.self_attn.q_proj.lora_A" in name)
    pair = {first, first.replace("lora_A", "lora_B")}

    def error(match, changed, **fields):
        write(tmp_path, changed, config | fields)
        with pytest.raises(lora.AdapterError, match=match):
            lora.load(tmp_path, CONFIG)

    incomplete = {name: x for name, x in tensors.items() if name not in pair}
    error(r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing", incomplete)
    error(
        "belong to the same module", tensors | {first.removeprefix("base_model.model."): np.ones(1)}
    )
    renamed = {n.replace("model.language_model.layers.1", "model.layers.1"): x
               for n, x in tensors.items()}  # fmt: skip
    error("follow different naming schemes", renamed)
    for other in ("base_model.model.model.language_model.embed_tokens.lora_embedding_A",
                  first.replace("lora_A.weight", "lora_magnitude_vector"),
                  "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight",
                  "base_model.model.lm_head.lora_A.weight"):  # fmt: skip
        error("belongs to no linear map that can have an adapter", tensors | {other: np.ones(1)})
    error("which adapter_config.json does not select", tensors, target_modules=["q_proj", "qkv"])
    error("has dtype int32", tensors | {first: tensors[first].astype(np.int32)})
    error("contains no tensors", {})


def test_patterns_that_exceed_the_time_limit_are_rejected(saved, tmp_path, monkeypatch):
    tensors, config = saved
    monkeypatch.setattr(adapter_files, "_REGEX_TIMEOUT", 0.05)
    slow = "(.*?)" * 8 + r"(.)\9\8_proj"
    for field in ("target_modules", "exclude_modules"):
        write(tmp_path, tensors, config | {field: slow})
        with pytest.raises(lora.AdapterError, match="a pattern cannot be used"):
            lora.load(tmp_path, CONFIG)


def test_safetensors_take_precedence_over_a_bin_file(saved, tmp_path, capsys):
    tensors, config = saved
    write(tmp_path, tensors, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"other weights")
    lora.load(tmp_path, CONFIG)
    assert "is used and adapter_model.bin ignored" in capsys.readouterr().err
    (tmp_path / lora.WEIGHTS).unlink()
    with pytest.raises(lora.AdapterError, match="adapter_model.bin: only safetensors are read"):
        lora.load(tmp_path, CONFIG)
