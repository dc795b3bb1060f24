"""Bytes and FLOPs that a program needs by formula, whatever its implementation.

Weights are read once per pass, saved activations written and read once; nothing is computed again.
FLOPs are those of matrix products and attention: 2 per weight and token, and 4 H per head and pair
of tokens that attend to each other. All are per device, if work and weights are split evenly.
"""

import dataclasses
import math

from mmsr1_jax.config import settings
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import tensor_table

_USUAL_PIXELS = 2**20  # of an image, where its size has no bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Shape of the rows of a pass over the model.

    Attributes:
      rows: Number of rows.
      length: Tokens of a row.
      patches: Image patches of a row.
      image_patches: Patches of an image, which attend to each other.
      columns: Tokens of a row whose logits are computed.
    """

    rows: int
    length: int
    patches: int
    image_patches: int
    columns: int


def image_patches(images: settings.Images, model: ModelConfig) -> int:
    """Return the number of patches of the largest image."""
    return (images.max_pixels or _USUAL_PIXELS) // model.vision.patch_size**2


def image_keys(config: ModelConfig, patches: int) -> float:
    """Return the number of patches that a patch of an image sees, mean over the tower's layers.

    Args:
      config: Configuration of the policy.
      patches: Number of patches of the image.
    """
    v = config.vision
    full = v.full_attention_share
    return full * patches + (1 - full) * min(patches, v.window_patches)


def forward_flops(config: ModelConfig, work: Work) -> dict[str, float]:
    """Return the FLOPs of a forward pass by part: `text`, `head`, `vision`, and their attention."""
    t, v = config.text, config.vision
    tokens, patches = work.rows * work.length, work.rows * work.patches
    weights = multiplied_weights(config)
    pair = 4.0 * t.num_layers * t.num_heads * t.head_dim  # of tokens that attend to each other
    merger = weights["mergers"] / v.merge_size**2
    keys = image_keys(config, min(work.patches, work.image_patches))
    return {
        "text": 2.0 * tokens * weights["text"],
        "text attention": pair * tokens * work.length / 2,  # causal
        "head": 2.0 * work.rows * work.columns * weights["head"],
        "vision": 2.0 * patches * (weights["vision"] + merger),
        "vision attention": 4.0 * v.num_layers * v.hidden_size * patches * keys,
    }


def gradient_flops(config: ModelConfig, work: Work, update: settings.Update) -> float:
    """Return the FLOPs of a forward and a backward pass.

    The backward pass costs a product for the gradient of the activations and one for that of the
    weights. Frozen weights need no gradient, and a tower without trained weights no backward pass.
    """
    text = 2 if update.lora_rank else 3  # adapters are small beside the weights
    vision = text if _trains_vision(update) else 1
    factors = {"vision": vision, "vision attention": 3 if vision > 1 else 1, "text attention": 3}
    return sum(
        flops * factors.get(part, text) for part, flops in forward_flops(config, work).items()
    )


def recomputed_flops(config: ModelConfig, work: Work, update: settings.Update, remat: str) -> float:
    """Return the FLOPs of the forward pass that a backward pass computes again.

    With `full` rematerialisation all layers that have a backward pass; of the output head, whose
    logits are never kept, always its product.
    """
    again = {"head"}
    if remat == "full":
        again |= {"text", "text attention"}
        again |= {"vision", "vision attention"} if _trains_vision(update) else set()
    return sum(flops for part, flops in forward_flops(config, work).items() if part in again)


def _trains_vision(update: settings.Update) -> bool:
    """Return whether the vision tower has a backward pass."""
    if update.lora_rank:
        return any(name.startswith("vision.") for name in update.lora_targets)
    return not update.freeze_vision


def multiplied_weights(config: ModelConfig) -> dict[str, int]:
    """Return the number of weights that a pass multiplies by: the kernels of linear maps.

    By part: `text` (the layers of the decoder), `head`, `vision` (patch embedding and blocks, for
    each patch), `mergers` (for each merged token).
    """
    weights = {"text": 0, "vision": 0, "mergers": 0}
    for path, tensor in tensor_table(config).items():
        if path[-1] == "kernel":
            part = path[0] if path[1] in ("layers", "patch_embed", "blocks") else "mergers"
            weights[part] += math.prod(tensor.shape) * len(tensor.layer_indices())
    return {**weights, "head": config.text.vocab_size * config.text.hidden_size}


def cached_flops(config: ModelConfig, rows: int, T: int, filled: int) -> float:
    """Return the FLOPs of T new tokens in each row after `filled` tokens of a cache.

    Without those of the head.
    """
    t = config.text
    products = 2.0 * multiplied_weights(config)["text"]
    attention = 4.0 * t.num_layers * t.num_heads * t.head_dim * (filled + (T + 1) / 2)  # causal
    return rows * T * (products + attention)


def saved_activation_bytes(config: ModelConfig, work: Work, itemsize: int) -> float:
    """Return the bytes of the inputs of all layers, which the backward pass needs at least."""
    t, v = config.text, config.vision
    text = t.num_layers * work.length * t.hidden_size
    return itemsize * work.rows * float(text + v.num_layers * work.patches * v.hidden_size)
