"""Settings from files and flags: types and bounds of every field, named in one line."""

import dataclasses
import json
import math

import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.config.settings import Config, ConfigError, validate
from mmsr1_jax.models.config import ConfigError as ModelConfigError
from mmsr1_jax.models.families import PRESETS, read_config
from mmsr1_jax.training import run_config

PARTS = [field.name for field in dataclasses.fields(Config)]


def numbers():
    """(part, field, default) of every number."""
    for part in PARTS:
        for field in dataclasses.fields(getattr(Config(), part)):
            value = getattr(getattr(Config(), part), field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield part, field.name, value


@pytest.mark.parametrize("part, name, default", numbers())
def test_every_number_has_bounds_and_a_type(part, name, default):
    wrong = [math.nan, math.inf, -math.inf, -(10**300), 10**300, True, "1", None, [1], -1e12]
    wrong += [1.0] if isinstance(default, int) else []
    for value in wrong:
        config = Config()
        setattr(getattr(config, part), name, value)
        if value is None and name in ("min_pixels", "max_pixels") and part == "images":
            continue
        with pytest.raises(ConfigError, match=rf"^config\.{part}(\.|: ){name}") as caught:
            validate(config)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def write(path, **changes):
    """The settings of a run as a file, with some of them changed: `part__field=value`."""
    run_config.write(path, Config(), "policy")
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, field = name.partition("__")
        data["config"][part][field] = value
    path.write_text(json.dumps(data))


def test_a_file_of_settings_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "config.json"
    write(path)
    config, model = run_config.read(path)
    assert (config, model) == (Config(), "policy")
    write(path, tools__timeout=20)  # a whole number for a float
    assert run_config.read(path)[0].tools.timeout == 20


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rollout__lanes": 10**9}, "config.rollout.lanes=1000000000 must be at most 65536"),
        ({"rollout__lanes": 16.0}, "config.rollout.lanes must be of type int, not 16.0"),
        ({"tools__timeout": math.nan}, "config.tools.timeout: must not be nan"),
        ({"tools__timeout": math.inf}, "config.tools.timeout: must not be inf"),
        ({"tools__timeout": "60"}, "config.tools.timeout must be of type float, not '60'"),
        ({"tools__text": ["local"]}, "config.tools.text must be of type str"),
        ({"buckets__lengths": [256, 10**12]}, "config.buckets.lengths=1000000000000 must be at"),
        ({"buckets__lengths": 256}, "config.buckets.lengths must be of type tuple"),
        ({"buckets__lengths": []}, "config.buckets.lengths=() must be positive"),
        ({"data__train": [5]}, "config.data.train must be of type tuple"),
        ({"data__train": ["a\0b"]}, "config.data.train='a\\x00b' must not contain a NUL"),
        ({"run__model": "\ud800"}, "config.run.model: contains a lone surrogate"),
        ({"update__lora_targets": ["q", "x"]}, "config.update.lora_targets='x' is not one of q"),
        ({"services__cache_max_bytes": 2**70}, "config.services.cache_max_bytes: must not be an"),
        ({"services__allowed_hosts": ["h"] * 200_000}, "allowed_hosts must have at most 100000"),
        ({"turns__prompt_dir": "x" * 200_000}, "must have at most 100000 characters"),
        ({"model__nothing": 1}, "config.model has no field 'nothing'"),
        ({"rollout__precompile": 1}, "precompile must be of type bool"),
    ],
)
def test_an_invalid_setting_in_a_file_is_named_with_the_file(tmp_path, changes, words):
    path = tmp_path / "config.json"
    write(path, **changes)
    with pytest.raises(ConfigError) as caught:
        run_config.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message
    assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested"), ("[]", "expected object"), ("5", "expected object"),
        ('{"model": 5, "config": {}}', "model: expected str, got int"),
        ('{"model": "", "config": {}}', "model: expected str of length >= 1"),
        ('{"model": "m"}', "field config"), ('{"model": "m", "config": []}', "config: expected"),
        ('{"model": "m", "config": {"run": 5}}', "config.run must be an object, not 5"),
        ('{"model": "m", "config": {"x": 1}}', "config has no field 'x'"),
        ('{"model": "m", "config": {"run": {"steps": [1]}}}', "config.run.steps must be of type"),
        ("\xff", "not UTF-8"), ("", "not JSON"),
    ],
)  # fmt: skip
def test_a_file_without_settings_is_named(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        run_config.read(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    with pytest.raises(ConfigError, match="none.json: cannot be read"):
        run_config.read(tmp_path / "none.json")


@pytest.mark.parametrize("value", [math.nan, -1, 10**400, "0", None, True])
def test_sampling_is_checked_where_it_is_used(value):
    with pytest.raises(ConfigError, match="config.sampling: temperature"):
        settings.validate_sampling(settings.Sampling(temperature=value))


def model_config(tmp_path, path=(), value=None):
    data = next(iter(PRESETS.values())).to_hf()
    if path:
        target = data
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(data))
    return file


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("vocab_size",), 10**12, "'vocab_size' must be a positive int of at most"),
        (("vocab_size",), 2**70, "vocab_size"), (("hidden_size",), True, "'hidden_size' must be"),
        (("hidden_size",), "2048", "'hidden_size' must be"), (("vocab_size",), 1.5, "'vocab_size'"),
        (("num_hidden_layers",), 10**6, "'num_hidden_layers' must be a positive int of at most"),
        (("rms_norm_eps",), 2.0, "'rms_norm_eps' must be"), (("rope_theta",), math.nan, "theta"),
        (("rope_theta",), 1e300, "'rope_theta' must be"), (("rms_norm_eps",), math.inf, "eps"),
        (("tie_word_embeddings",), "no", "'tie_word_embeddings' must be true or false"),
        (("use_sliding_window",), 1, "'use_sliding_window' must be true or false"),
        (("image_token_id",), 10**9, "'image_token_id' must be a token id"),
        (("model_type",), ["x"] * 1000, "model_type"), (("hidden_act",), {}, "hidden_act"),
        (("rope_scaling", "type"), ["mrope"], "rope type"), (("rope_scaling",), 5, "rope_scaling"),
        (("rope_scaling", "mrope_section"), [16, 24, True], "'mrope_section'"),
        (("vision_config", "patch_size"), 10**6, "vision_config: field 'patch_size'"),
        (("vision_config", "depth"), -1, "vision_config: field 'depth'"),
        (("vision_config", "fullatt_block_indexes"), [1e9], "vision_config: .*fullatt"),
        (("vision_config", "fullatt_block_indexes"), [99], "vision_config: fullatt"),
        (("vision_config",), [], "'vision_config' must be an object"),
    ],
)  # fmt: skip
def test_a_policys_config_is_checked_by_field(tmp_path, path, value, words):
    file = model_config(tmp_path, path, value)
    with pytest.raises(ModelConfigError, match=words) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and len(message) < 400 and "\n" not in message


def test_a_policys_config_that_is_deep_or_no_object_is_named(tmp_path):
    assert read_config(model_config(tmp_path).parent) in PRESETS.values()
    for text in ("[" * 100_000, "[]", "5", "null", '{"a": ' * 100 + "1" + "}" * 100):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelConfigError, match="config.json: "):
            read_config(tmp_path)
