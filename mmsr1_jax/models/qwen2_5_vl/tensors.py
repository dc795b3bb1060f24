"""Tensors of Qwen2.5-VL's vision tower in HF checkpoints."""

from mmsr1_jax.models.qwen2_5_vl.config import VisionConfig
from mmsr1_jax.models.tensors import TensorTable


def vision_tensors(v: VisionConfig) -> TensorTable:
    """Return the parameters of the vision tower."""
    d, f, merged, L = (
        v.hidden_size,
        v.intermediate_size,
        v.hidden_size * v.merge_size**2,
        v.num_layers,
    )
    table = TensorTable()
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    table.add("vision/patch_embed/kernel", "patch_embed.proj.weight", (d, *patch))
    block, path = "blocks.{}.", "vision/blocks/"
    table.add(path + "attention_norm/scale", block + "norm1.weight", (d,), L)
    table.add_linear(path + "attention/qkv", block + "attn.qkv", 3 * d, d, bias=True, layers=L)
    table.add_linear(path + "attention/out", block + "attn.proj", d, d, bias=True, layers=L)
    table.add(path + "mlp_norm/scale", block + "norm2.weight", (d,), L)
    for key, out, inp in (("gate", f, d), ("up", f, d), ("down", d, f)):
        name = f"{block}mlp.{key}_proj"
        table.add_linear(f"{path}mlp/{key}", name, out, inp, bias=True, layers=L)
    table.add("vision/merger/norm/scale", "merger.ln_q.weight", (d,))
    table.add_linear("vision/merger/fc1", "merger.mlp.0", merged, merged, bias=True)
    table.add_linear("vision/merger/fc2", "merger.mlp.2", v.out_hidden_size, merged, bias=True)
    return table
