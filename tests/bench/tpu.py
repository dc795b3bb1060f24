"""Compile the full 7B model for a TPU slice without a TPU, and print its memory use per chip.

python -m tests.bench.tpu [--topology=v5e:2x4] [--fsdp=4 --tensor=2]

Needs libtpu (`pip install "jax[tpu]"`); run it with JAX_PLATFORMS=cpu.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl.checkpoint import abstract_model


def abstract_rows(config, mesh, rows: int, length: int, windows: int) -> qwen2_5_vl.Rows:
    def array(*shape, dtype=jnp.int32):
        axes = ("batch",) + (None,) * (len(shape) - 1)
        spec = sharding.partition_spec(axes, shape, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    patches = windows * config.vision.window_patches
    return qwen2_5_vl.Rows(
        tokens=array(rows, length),
        positions=array(rows, 3, length),
        segment_ids=array(rows, length),
        image_index=array(rows, length),
        images=qwen2_5_vl.ImageRows(
            patches=array(rows, patches, config.vision.patch_dim, dtype=jnp.float32),
            positions=array(rows, patches, 2),
            segment_ids=array(rows, patches),
        ),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    jax.default_backend = lambda: "tpu"  # so that `auto` chooses as on a TPU
    mesh = sharding.make_mesh(1, options.fsdp, options.tensor, devices=topology.devices)
    config = qwen2_5_vl.PRESETS["7b"]
    dtypes = dict(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    graph, params = nnx.split(abstract_model(config, remat="full", **dtypes))
    shardings = sharding.param_shardings(params, mesh)
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, shardings
    )
    rows = abstract_rows(config, mesh, options.fsdp, options.length, options.windows)

    def loss(params, rows):
        return nnx.merge(graph, params).token_logprobs(rows).sum()

    programs = {
        "forward": jax.jit(loss),
        "gradient": jax.jit(jax.grad(loss), out_shardings=shardings),
    }
    print(
        "| program | arguments per chip | temporaries per chip | TPU kernels |\n|---|---|---|---|"
    )
    with jax.set_mesh(mesh):
        for name, program in programs.items():
            compiled = program.lower(params, rows).compile()
            memory = compiled.memory_analysis()
            arguments, temporaries = (
                size / 2**30 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
            )
            kernels = compiled.as_text().count("tpu_custom_call")
            print(f"| {name} | {arguments:.2f} GiB | {temporaries:.2f} GiB | {kernels} |")


if __name__ == "__main__":
    main()
