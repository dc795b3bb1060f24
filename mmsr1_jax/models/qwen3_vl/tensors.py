"""Tensors of Qwen3-VL's vision tower in HF checkpoints."""

from mmsr1_jax.models.qwen3_vl.config import VisionConfig
from mmsr1_jax.models.tensors import TensorTable


def vision_tensors(v: VisionConfig) -> TensorTable:
    """Return the parameters of the vision tower."""
    d, f, L = v.hidden_size, v.intermediate_size, v.num_layers
    merged, deep = d * v.merge_size**2, len(v.deepstack_indexes)
    table = TensorTable()
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    table.add("vision/patch_embed/kernel", "patch_embed.proj.weight", (d, *patch))
    table.add("vision/patch_embed/bias", "patch_embed.proj.bias", (d,))
    table.add("vision/position_embedding", "pos_embed.weight", (v.num_position_embeddings, d))
    block, path = "blocks.{}.", "vision/blocks/"
    table.add_layer_norm(path + "attention_norm", block + "norm1", d, L)
    table.add_linear(path + "attention/qkv", block + "attn.qkv", 3 * d, d, bias=True, layers=L)
    table.add_linear(path + "attention/out", block + "attn.proj", d, d, bias=True, layers=L)
    table.add_layer_norm(path + "mlp_norm", block + "norm2", d, L)
    table.add_linear(path + "mlp/fc1", block + "mlp.linear_fc1", f, d, bias=True, layers=L)
    table.add_linear(path + "mlp/fc2", block + "mlp.linear_fc2", d, f, bias=True, layers=L)
    mergers: list[tuple[str, str, int, int | None]] = [("vision/merger/", "merger.", d, None)]
    if deep:
        mergers.append(("vision/deepstack/", "deepstack_merger_list.{}.", merged, deep))
    for path, name, normed, layers in mergers:
        table.add_layer_norm(path + "norm", name + "norm", normed, layers)
        out = v.out_hidden_size
        table.add_linear(
            path + "fc1", name + "linear_fc1", merged, merged, bias=True, layers=layers
        )
        table.add_linear(path + "fc2", name + "linear_fc2", out, merged, bias=True, layers=layers)
    return table
