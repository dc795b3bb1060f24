"""Bytes and FLOPs that a program needs by formula, whatever its implementation.

Weights are read once per pass, saved activations written and read once; nothing is computed again.
FLOPs are those of matrix products and attention: 2 per weight and token, and 4 H per head and pair
of tokens that attend to each other. All are per device, if work and weights are split evenly.
"""

import dataclasses

from mmsr1_jax.config import settings
from mmsr1_jax.models.qwen2_5_vl import ModelConfig

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
    full = len(v.full_attention_layers) / v.num_layers
    return full * patches + (1 - full) * min(patches, v.window_patches)


def forward_flops(config: ModelConfig, work: Work) -> dict[str, float]:
    """Return the FLOPs of a forward pass by part: `text`, `head`, `vision`, and their attention."""
    t, v = config.text, config.vision
    tokens, patches = work.rows * work.length, work.rows * work.patches
    H, N, K = t.head_dim, t.num_heads, t.num_kv_heads
    layer = t.hidden_size * (2 * N + 2 * K) * H + 3 * t.hidden_size * t.intermediate_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    merged = v.hidden_size * v.merge_size**2
    merger = (merged * merged + merged * v.out_hidden_size) / v.merge_size**2
    keys = image_keys(config, min(work.patches, work.image_patches))
    return {
        "text": 2.0 * tokens * t.num_layers * layer,
        "text attention": 4.0 * t.num_layers * N * H * tokens * work.length / 2,  # causal
        "head": 2.0 * work.rows * work.columns * t.vocab_size * t.hidden_size,
        "vision": 2.0 * patches * (v.num_layers * block + v.patch_dim * v.hidden_size + merger),
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
    """Return the number of weights that a pass multiplies by: all but the embedding table.

    By part: `text` (the layers of the decoder), `head`, `vision`.
    """
    t, v = config.text, config.vision
    H, N, K = t.head_dim, t.num_heads, t.num_kv_heads
    layer = t.hidden_size * (2 * N + 2 * K) * H + 3 * t.hidden_size * t.intermediate_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    merged = v.hidden_size * v.merge_size**2
    vision = v.num_layers * block + v.patch_dim * v.hidden_size
    return {
        "text": t.num_layers * layer,
        "head": t.vocab_size * t.hidden_size,
        "vision": vision + merged * merged + merged * v.out_hidden_size,
    }


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
