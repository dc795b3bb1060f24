"""The same policy in `transformers`/torch, for comparison, and random conversations for both."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mmsr1_jax.models import checkpoint
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import FAMILIES
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.models.tensors import LAYOUTS
from mmsr1_jax.processing.images import Patches
from mmsr1_jax.processing.processor import Prompt

torch.set_grad_enabled(False)


# The small random policy of each family.
SMALL = {name: family.small["random"] for name, family in FAMILIES.items()}


def over_families(fixture: str, *, proof: bool):
    """Return a mark that runs a test with each family's name as the parameter of a fixture.

    With `proof`, only the first family is tested every day.
    """
    first, *others = SMALL
    marks = [pytest.mark.proof] if proof else []
    names = [first, *(pytest.param(name, marks=marks) for name in others)]
    return pytest.mark.parametrize(fixture, names, indirect=True)


FAMILIES_PROVED = over_families("model", proof=True)
FAMILIES_TESTED = over_families("model", proof=False)


def variant(family: str = "qwen2_5_vl", **text) -> ModelConfig:
    """Return a small random policy's configuration with changed fields of the text decoder."""
    config = SMALL[family]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **text))


def torch_architecture(config: ModelConfig) -> PreTrainedModel:
    """Return the torch implementation with parameters of its own, float32."""
    config = AutoConfig.for_model(**config.to_hf("float32"))
    return AutoModelForImageTextToText.from_config(config).eval()


def named_tensors(model: Policy) -> dict[str, np.ndarray]:
    """Return the parameters by their names in the torch implementation."""
    return dict(checkpoint.hf_tensors(model, LAYOUTS[1]))


def torch_model(model: Policy) -> PreTrainedModel:
    """Return the torch implementation with the parameters of `model`, float32."""
    reference = torch_architecture(model.config)
    state = {name: torch.tensor(array) for name, array in named_tensors(model).items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if model.config.text.tie_embeddings else []
    assert missing == tied and not unexpected, (missing, unexpected)
    if tied:
        reference.tie_weights()
    return reference


def torch_inputs(prompt: Prompt, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the torch model's keyword arguments for one conversation (batch of 1)."""
    ids = torch.tensor(prompt.tokens, dtype=torch.long)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        # Without these the reference falls back to linear positions.
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    if prompt.images:
        inputs["pixel_values"] = torch.tensor(np.concatenate([i.values for i in prompt.images]))
        inputs["image_grid_thw"] = torch.tensor(prompt.grids)
    return inputs


def random_conversation(rng, config: ModelConfig, layout) -> Prompt:
    """Return a conversation of random texts and images.

    Args:
      rng: NumPy generator.
      config: Model configuration.
      layout: Lengths of texts (int) and sizes of images (rows, columns[, frames]), in merged
        tokens.
    """
    special = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}
    special.add(config.video_token_id)
    ordinary = [i for i in range(config.text.vocab_size) if i not in special]
    merge, tokens, images = config.vision.merge_size, [], []
    for item in layout:
        if isinstance(item, int):
            tokens += rng.choice(ordinary, item).tolist()
            continue
        rows, columns, frames = (*item, 1)[:3]
        grid = (frames, rows * merge, columns * merge)
        values = rng.normal(size=(frames * grid[1] * grid[2], config.vision.patch_dim))
        images.append(Patches(values.astype(np.float32), grid))
        count = frames * rows * columns
        tokens += [config.vision_start_token_id, *[config.image_token_id] * count]
        tokens.append(config.vision_end_token_id)
    return Prompt(np.array(tokens, np.int32), tuple(images))


def torch_logits(reference, prompt: Prompt, config: ModelConfig) -> np.ndarray:
    """Return the torch model's logits of one conversation, float32[T, V]."""
    return reference(**torch_inputs(prompt, config)).logits[0].numpy()
