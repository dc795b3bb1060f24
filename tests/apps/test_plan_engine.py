"""Programs of an engine in a plan: what they need, what their kernels fetch, and what they copy."""

import dataclasses
import importlib.util

import jax
import pytest
from flax import nnx

from mmsr1_jax.apps.plan import engine, kernels, memory, needs, programs, targets, traffic
from mmsr1_jax.apps.plan.hlo import Array
from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.models.families import PRESETS
from mmsr1_jax.rollout import decode
from mmsr1_jax.scripts import random_policy

MODEL = random_policy.CONFIG
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
VISIBLE = kernels.Visible(length=8192, image_patches=4608, image_keys=1000.0)


def config(**rollout):
    result = settings.Config()
    result.model.dtype = "float32"
    for name, value in rollout.items():
        setattr(result.rollout, name, value)
    return result


def engine_programs(config, model=MODEL, tensor=1):
    rollout = engine.make_engine(config, model, jax.devices(), tensor)
    listed = engine.engine_programs(config, model, sharding.make_mesh(), rollout)
    return rollout, {program.name: program for program in listed}


def text_bytes(params, *, without=()):
    """Bytes of the kernels of the text decoder on a device."""
    leaves = jax.tree_util.tree_leaves_with_path(params["text"])
    names = [("".join(map(str, path)), x) for path, x in leaves]
    kept = [x for name, x in names if ("kernel" in name or "head" in name)
            and not any(part in name for part in without)]  # fmt: skip
    return memory.device_bytes(kept)


def test_programs_of_an_engine_and_those_of_a_plan_by_default():
    run = config(prefill_buckets=(32, 64))
    run.buckets.image_windows = (4, 8, 16)
    _, listed = engine_programs(run)
    assert list(listed) == [
        "load", "encode 4 windows", "encode 8 windows", "encode 16 windows",
        "extend 32 tokens", "extend 64 tokens", "decode", "fork", "read_pages",
    ]  # fmt: skip
    usual = engine.usual_programs(list(listed))
    assert [name for name in listed if name not in usual] == ["encode 8 windows"]
    assert {p.phase for name, p in listed.items() if name != "load"} == {"rollout"}
    assert listed["load"].phase == "load"


@pytest.mark.parametrize("tensor", [1, 2])
def test_decode_and_extend_need_weights_and_what_is_filled(tensor):
    run = config(decode_batch_size=6, prefill_buckets=(32, 64), prefill_tokens=128)
    run.turns.max_episode_tokens = 2048
    rollout, listed = engine_programs(run, tensor=tensor)
    params, t = rollout.abstract_params(), MODEL.text
    assert t.num_kv_heads % 2 == 0
    token = 2 * t.num_layers * t.num_kv_heads * t.head_dim * 4 / tensor
    head = t.vocab_size * t.hidden_size * 4 / tensor
    layers = text_bytes(params, without=("head",))
    assert listed["decode"].needed_bytes == layers + head + 6 * 1025 * token
    # 2 rows read 1024 tokens and those that they write.
    assert listed["extend 64 tokens"].needed_bytes == layers + 2 * (1024 + 2 * 64) * token
    pairs = 64 * 1024 + 64 * 65 / 2
    attention = 4 * t.num_layers * t.num_heads * t.head_dim * 2 * pairs / tensor
    assert listed["extend 64 tokens"].flops == pytest.approx(2 * 128 * layers / 4 + attention)


def test_state_and_cache_are_those_of_the_compiled_programs():
    rollout, listed = engine_programs(config(lanes=5))
    cache = memory.device_bytes(rollout.abstract_state()[0])
    assert memory.cache_size(config(lanes=5), rollout).bytes == cache
    compiled = listed["fork"].lower().compile()
    assert listed["fork"].inputs == 4 * 4
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == cache + listed["fork"].inputs
    # A page and a hidden state are copied by way of a temporary, see `cache.fork`.
    hidden = MODEL.text.hidden_size * 4
    page, layers = memory.cache_size(config(lanes=5), rollout).page_bytes, MODEL.text.num_layers
    moved = traffic.measure(compiled.as_text())
    assert 0 <= moved.bytes - listed["fork"].needed_bytes - 2 * (page + hidden) < 0.01 * page
    assert max(i.read + i.written for i in moved.largest(1)) < 2.01 * page / layers
    assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * page


def test_inputs_are_the_arguments_without_parameters_and_caches():
    run = config(lanes=5, prefill_buckets=(32, 64))
    run.buckets.image_windows = (4,)
    rollout, listed = engine_programs(run)
    params = rollout.abstract_params()
    cache, images = rollout.abstract_state()
    used = {  # the compiler drops parameters that a program does not use
        "extend 32 tokens": (params["text"], cache, images),
        "decode": (params["text"], cache),
        "encode 4 windows": (params["vision"], images),
        "read_pages": cache.pages,
    }
    unused = {"extend 32 tokens": params["text"]["head"]}
    for name, state in used.items():
        sizes = listed[name].lower().compile().memory_analysis()
        arguments = memory.device_bytes(state) + listed[name].inputs
        arguments -= memory.device_bytes(unused.get(name, ()))
        assert sizes.argument_size_in_bytes == arguments, name


def test_load_reads_the_trainers_parameters_and_writes_those_of_an_engine():
    mesh = sharding.make_mesh()
    assert mesh.size > 1
    rollout, listed = engine_programs(config())
    compiled = listed["load"].lower().compile()
    sizes, own = compiled.memory_analysis(), memory.device_bytes(rollout.abstract_params())
    assert sizes.output_size_in_bytes == pytest.approx(own, rel=1e-3)  # a whole copy
    needed = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    assert listed["load"].needed_bytes == pytest.approx(needed, rel=1e-3)


def test_the_tpu_kernel_fetches_whole_blocks_once_per_block_of_queries():
    pages, table = Array("bf16", (3073, 128, 2, 128)), Array("s32", (48, 64))
    kernel = kernels.engine_kernels(4096, VISIBLE)["ragged_paged_attention"]
    token = 2 * 128 * 2
    one = kernel("", [Array("s32", (48,)), table, Array("bf16", (48, 7, 128), 1), pages])
    assert one.bytes == 48 * 9 * 512 * token  # 4,097 tokens; queries are on the chip
    assert one.flops == 4 * 48 * 7 * 128 * 9 * 512
    q = Array("bf16", (2 * 256, 7, 128))
    many = kernel("", [Array("s32", (2,)), Array("s32", (2, 64)), q, pages])
    assert many.bytes == 2 * 2 * 9 * 512 * token + 2 * q.bytes  # 4,352 tokens, twice a row


def test_the_packed_tpu_kernel_visits_blocks_of_one_segment():
    q, kv = Array("bf16", (4, 7, 8192, 128)), Array("bf16", (4, 8192, 128))
    ids = [Array("s32", (8192, 128)), Array("s32", (8, 8192))]
    path, pairs = "splash_mha_fwd_segmented_residuals/pallas_call", 28 * 8192 * 8192 / 2
    once, both = (
        kernels.attention_kernels(dataclasses.replace(VISIBLE, parts=n))["pallas_call"]
        for n in (1, 2)
    )
    text = [q, kv, kv, *ids, Array("s32", (8192, 128))]
    assert once(path, text).flops == 2 * 2 * 128 * pairs
    assert both(path, text).flops == 2 * 2 * 128 * pairs / 2  # each of two runs
    vision = once(path, [q, kv, kv, *ids])
    assert vision.flops == 2 * 2 * 128 * 28 * 8192 * (1000 + 512)
    assert both(path, [q, kv, kv, *ids]) == vision
    # Blocks of 512 queries fetch three of keys and values; sums in 128 lanes are written.
    fetched = 28 / 4 * 2 * kv.bytes * (1000 + 512) / 512
    others = sum(a.bytes for a in ids) + 2 * q.bytes + 2 * kv.bytes - 28 / 4 * 2 * kv.bytes
    assert vision.bytes == pytest.approx(fetched + others + 4 * q.size)


def test_the_gated_product_counts_both_products():
    x, weights = Array("bf16", (1024, 3584)), Array("bf16", (18944, 3584))
    cost = kernels.engine_kernels(4096, VISIBLE)["gated_linear"]("", [x, weights, weights])
    assert cost.flops == 2 * 2 * 1024 * 3584 * 18944
    assert cost.bytes == 2 * (1024 * 3584 + 2 * 18944 * 3584 + 1024 * 18944)


def test_the_gated_layer_counts_three_products_and_no_hidden_units():
    x, weights = Array("bf16", (1024, 3584)), Array("bf16", (18944, 3584))
    down = Array("bf16", (3584, 18944))
    cost = kernels.engine_kernels(4096, VISIBLE)["gated_mlp"]("", [x, weights, weights, down])
    assert cost.flops == 3 * 2 * 1024 * 3584 * 18944
    assert cost.bytes == 2 * (2 * 1024 * 3584 + 3 * 18944 * 3584)


def test_the_gpu_kernel_fetches_filled_blocks_and_writes_partial_sums():
    q, pages = Array("bf16", (48, 2, 8, 128)), Array("bf16", (3073, 4, 128, 128))
    kernel = kernels.engine_kernels(4096, VISIBLE)["paged_decode"]
    cost = kernel("", [q, pages, Array("s32", (48, 64)), Array("s32", (48,))])
    fetched = 48 * 4 * (4096 + 64) * 128 * 2
    sums = 48 * 5 * 2 * 8 * (128 + 2) * 4  # five thread blocks of 1,024 tokens a row
    queries = 5 * q.bytes  # once per thread block
    assert cost.bytes == fetched + sums + queries


def measure(program):
    """Compile a program of the plan and return its costs."""
    text = program.lower().compile().as_text()
    return traffic.measure(text, trips=program.trips, kernels=program.kernels)


def small_run():
    """Settings with a cache that is large beside everything else, and a decoder whose largest
    matrix is more than a quarter of a layer, as in the 7B."""
    run = config(lanes=64, decode_batch_size=4, prefill_buckets=(64,), prefill_tokens=64)
    run.turns.max_episode_tokens = 2048
    text = dataclasses.replace(MODEL.text, intermediate_size=4 * MODEL.text.hidden_size)
    return run, dataclasses.replace(MODEL, text=text)


def bounds(rollout, model, itemsize):
    """Sizes on a device that `traffic.wasteful` compares with."""
    devices = len(rollout.replicated.device_set) // rollout.num_engines
    layer = needs.multiplied_weights(model)["text"] / model.text.num_layers
    cache = memory.device_bytes(rollout.abstract_state()[0].pages)
    return {"cache_bytes": cache, "layer_bytes": itemsize * layer / devices}


@pytest.mark.parametrize("lockstep", ["never", "always"])
def test_decode_copies_no_part_of_the_cache(lockstep):
    """On a CPU, with a cache that is large beside everything else."""
    run, model = small_run()
    run.rollout.lockstep = lockstep
    rollout, listed = engine_programs(run, model)
    assert rollout.num_engines == (8 if lockstep == "always" else 1)
    sizes = bounds(rollout, model, itemsize=4)
    assert sizes["layer_bytes"] / 4 < 0.02 * sizes["cache_bytes"]
    costs = measure(listed["decode"])
    assert traffic.wasteful(costs, **sizes) == [] and costs.unknown_loops == ()

    # The same program without donation copies each layer's pages.
    call = next(call for call in rollout.calls() if call.name == "decode")
    with rollout.context():
        kept = jax.jit(call.program.__wrapped__, static_argnames=("steps", "running"))
        text = kept.lower(*call.args, **call.keywords).compile().as_text()
    copies = traffic.wasteful(traffic.measure(text), **sizes)
    assert sum(i.written for i in copies) >= sizes["cache_bytes"]


def test_stacked_layers_that_are_written_out_to_be_read_again_are_found():
    """The program of the engine, but with the trainer's parameters."""
    run, model = small_run()
    rollout, listed = engine_programs(run, model)
    call = next(call for call in rollout.calls() if call.name == "decode")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    graph, params = nnx.split(programs.make_policy(run, model, mesh, "float32", remat="none"))

    def stacked(params, *args, **keywords):
        return decode.decode(nnx.merge(graph, params), *args, **keywords)

    program = jax.jit(stacked, donate_argnums=1, static_argnames=("steps", "running"))
    with rollout.context():
        text = program.lower(params, *call.args[1:], **call.keywords).compile().as_text()
    costs = traffic.measure(text, trips=listed["decode"].trips)
    copies = traffic.wasteful(costs, **bounds(rollout, model, itemsize=4))
    matrices = 3 * 4 * model.text.hidden_size * model.text.intermediate_size  # of a layer
    assert sum(i.written * i.runs for i in copies) >= model.text.num_layers * matrices


@pytest.mark.parametrize("name", ["decode", "extend 64 tokens"])
def test_attention_without_a_kernel_counts_the_pages_that_are_filled(name):
    run, model = small_run()
    rollout, listed = engine_programs(run, model)
    costs = measure(listed[name])
    assert costs.unknown_loops == ()
    loop = [i for i in costs.instructions if i.loop.endswith("page_loop/while")]
    assert {i.runs for i in loop} == {1024 / 128 + 1}  # and the page of the new tokens
    t = model.text
    keys_and_values = 2 * t.num_layers * t.num_kv_heads * t.head_dim * 4 * 1024
    rows = run.rollout.decode_batch_size if name == "decode" else rollout.extend_rows(64)
    assert sum(i.read * i.runs for i in loop) >= rows * keys_and_values
    assert costs.bytes >= listed[name].needed_bytes


def test_the_samplers_searches_count_as_often_as_the_settings_need_them():
    run, model = small_run()

    def searches(**sampling):
        for name, value in sampling.items():
            setattr(run.sampling, name, value)
        costs = measure(engine_programs(run, model)[1]["decode"])
        return {i.runs for i in costs.instructions if i.loop.endswith("threshold_search/while")}

    assert searches() == {0}
    assert searches(top_k=40) == {1}
    assert searches(top_p=0.9) == {2}


def compiled(target, tensor, program):
    """Compile a program for an accelerator: two layers of the 7B, 48 rows of 4,096 tokens.

    Returns:
      Program, its costs, bytes of its temporaries, and sizes that copies are compared with.
    """
    model = PRESETS["qwen2.5-vl-7b"]
    model = dataclasses.replace(
        model,
        text=dataclasses.replace(model.text, num_layers=2),
        vision=dataclasses.replace(model.vision, num_layers=2, full_attention_layers=(1,)),
    )
    run = config(lanes=48, decode_batch_size=48, prefill_buckets=(1024,), prefill_tokens=1024)
    run.model.dtype, run.turns.max_episode_tokens = "bfloat16", 8192
    devices = targets.make_target(target).devices
    rollout = engine.make_engine(run, model, devices, tensor)
    listed = engine.engine_programs(run, model, sharding.make_mesh(devices=devices), rollout)
    program = next(p for p in listed if p.name == program)
    text = program.lower().compile()
    costs = traffic.measure(text.as_text(), trips=program.trips, kernels=program.kernels)
    temporaries = text.memory_analysis().temp_size_in_bytes
    return program, costs, temporaries, bounds(rollout, model, itemsize=2)


def skip_without_compiler(target):
    packages = COMPILERS["gpu" if target.startswith("h100") else "tpu"]
    if not any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"the compiler for {target} is not installed")


# Target, tensor and bytes of `extend` by those needed: two layers make little of the weights beside
# the activations, which XLA writes out between the fusions of a GPU.
ACCELERATORS = [
    ("h100:1x1", 1, 2.7),
    pytest.param("v5e:2x2", 4, 1.5, marks=pytest.mark.proof),  # minutes on two cores
    pytest.param("v6e:2x2", 2, 1.5, marks=pytest.mark.proof),  # in lockstep
    pytest.param("v5e:4x4", 4, 1.5, marks=pytest.mark.proof),  # in lockstep, on four hosts
    pytest.param("v5p:2x2x1", 1, 1.85, marks=pytest.mark.proof),
]


@pytest.mark.parametrize(("target", "tensor", "_"), ACCELERATORS)
def test_decode_moves_little_more_than_it_needs(target, tensor, _):
    skip_without_compiler(target)
    program, costs, temporaries, sizes = compiled(target, tensor, "decode")
    assert traffic.wasteful(costs, **sizes) == []
    assert len(costs.of_kind("kernel")) == 2
    assert 1.0 <= costs.bytes / program.needed_bytes <= 1.25
    assert temporaries <= 2**30


@pytest.mark.parametrize(("target", "tensor", "ratio"), ACCELERATORS)
def test_extend_moves_little_more_than_it_needs(target, tensor, ratio):
    """Of 1,024 tokens behind 4,096."""
    skip_without_compiler(target)
    program, costs, temporaries, _ = compiled(target, tensor, "extend 1024 tokens")
    assert 1.0 <= costs.bytes / program.needed_bytes <= ratio
    assert temporaries <= 2**30


def test_a_fork_needs_the_memory_of_one_layers_page_at_a_time():
    skip_without_compiler("h100:1x1")
    program, _, temporaries, _ = compiled("h100:1x1", 1, "fork")
    page = program.needed_bytes / 2 / 2  # read and written, in two layers
    assert temporaries < 1.01 * page
