"""Targets of a plan, and the estimated time of a program on them."""

import importlib.util
import itertools
import types

import pytest

from mmsr1_jax.apps.plan import estimate, targets
from mmsr1_jax.apps.plan.collectives import Collective
from mmsr1_jax.apps.plan.network import Network
from mmsr1_jax.apps.plan.targets import CHIPS, Target
from mmsr1_jax.apps.plan.traffic import Instruction, Traffic
from mmsr1_jax.config.errors import UserError

HAS_TPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:", "v5p:2x0", "v5p:2", "h100:8", "a100:1x8", "v5p:2*2"]
)
def test_names_that_are_no_target_are_rejected(name):
    with pytest.raises(UserError, match=r"must be a chip and a shape, such as v5p:2x2x2"):
        targets.make_target(name)


@pytest.mark.parametrize(("name", "extra"), [("v5p:2x2x2", "tpu"), ("h100:1x8", "cuda")])
def test_a_missing_compiler_names_the_extra_to_install(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError) as error:
        targets.make_target(name)
    assert f'pip install "mmsr1_jax[{extra}]"' in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not HAS_TPU, reason="libtpu is not installed")
def test_a_tpu_slice_has_hosts_and_a_product_near_its_peak():
    target = targets.make_target("v5p:2x2x2")
    assert (len(target.devices), target.num_hosts) == (8, 2)
    product = estimate.calibrate(target)
    assert 0.8 < product.efficiency < 1.0
    with pytest.raises(UserError, match="v5p:3x5"):
        targets.make_target("v5p:3x5")


def test_the_description_of_an_h200_differs_in_its_memory():
    h100, h200 = (targets.gpu_description(CHIPS[name]) for name in ("h100", "h200"))
    changed = [
        (a.strip(), b.strip())
        for a, b in zip(h100.splitlines(), h200.splitlines(), strict=True)
        if a != b and not a.startswith("#")
    ]
    assert changed == [
        (
            'device_description_str: "NVIDIA H100 80GB HBM3"',
            'device_description_str: "NVIDIA H200"',
        ),
        ("device_memory_size: 84942979072", "device_memory_size: 141000000000"),
        ("memory_bandwidth: 3352320000000", "memory_bandwidth: 4800000000000"),
    ]


def slice_of(kind, *shape):
    """A TPU slice with the coordinates of its chips, the first axis fastest."""
    places = itertools.product(*(range(size) for size in reversed(shape)))
    chips = [types.SimpleNamespace(coords=place[::-1], process_index=0) for place in places]
    name = f"{kind}:{'x'.join(map(str, shape))}"
    return Network(Target(name, CHIPS[kind], chips), chips)


def gpus(hosts, count):
    devices = [types.SimpleNamespace(process_index=i // count) for i in range(hosts * count)]
    return Network(Target(f"h100:{hosts}x{count}", CHIPS["h100"], devices), devices)


@pytest.mark.parametrize(
    ("network", "groups", "expected"),
    [
        (slice_of("v5p", 2, 2, 2), [(0, 1), (2, 3)], 100e9),  # one link of six
        (slice_of("v5p", 2, 2, 2), [(0, 1, 2, 3)], 200e9),  # along two axes
        (slice_of("v5p", 2, 2, 2), [], 300e9),
        (slice_of("v5p", 2, 2, 2), [(0, 7), (7, 0)], 100e9),  # sources and targets
        (slice_of("v5p", 4, 4, 4), [], 600e9),  # rings along all axes
        (slice_of("v5p", 4, 4, 4), [(0, 1, 2, 3)], 200e9),
        (slice_of("v5p", 4, 4, 4), [(0, 1)], 100e9),  # part of a ring
        (slice_of("v5e", 4, 4), [(0, 1, 2, 3)], 50e9),  # too short for a ring
        (slice_of("v5e", 16, 16), [], 200e9),
        (gpus(1, 8), [(0, 1), (2, 3)], 450e9),  # through the switch
        (gpus(4, 8), [tuple(range(8)), tuple(range(8, 16))], 450e9),
        (gpus(4, 8), [], 400e9),  # the adapters of a host
        (gpus(4, 8), [tuple(range(n, 32, 8)) for n in range(8)], 50e9),  # one of each host
        (gpus(4, 8), [(0, 1), (7, 8)], 50e9),  # the slowest group
    ],
)
def test_bandwidth_of_a_group_is_that_of_the_links_between_its_devices(network, groups, expected):
    assert network.bandwidth(tuple(groups)) == pytest.approx(expected)


def instruction(**costs):
    if received := costs.pop("links", 0.0):
        costs["collective"] = Collective("all-gather", (), received)
    common = dict(name="fusion.1", opcode="fusion", kind="other", where="", result="", runs=2.0)
    return Instruction(**{**common, "read": 0.0, "written": 0.0, **costs})


def test_an_instruction_takes_the_largest_of_its_times():
    chip, network = CHIPS["v5p"], slice_of("v5p", 4, 4, 4)
    product = Traffic((instruction(cycles=4652072 / 2),), (), ())
    calibration = estimate.calibration(product, chip)
    assert calibration.efficiency == pytest.approx(0.901, abs=1e-3)
    assert calibration.seconds == pytest.approx(4652072 / 1.75e9)
    for costs, seconds in (
        (dict(cycles=1.75e9, read=1e6), 1.0),  # cycles / clock
        (dict(cycles=1.75e9, read=2765e9, written=2765e9), 2.0),  # bytes / bandwidth
        (dict(flops=459e12), 1 / calibration.efficiency),  # of a kernel
        (dict(read=1.0, links=1800e9), 3.0),  # of a collective
    ):
        program = Traffic((instruction(**costs),), (), ())
        assert estimate.program_seconds(program, network, calibration) == pytest.approx(2 * seconds)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([], 2.0),  # nothing hides the two copies
        ([dict(cycles=1.75e9 / 2)], 2.0),  # half a second of 2 is hidden, and takes itself
        ([dict(cycles=3 * 1.75e9)], 3.0),  # all of it is hidden
        ([dict(read=2765e9)], 3.0),  # nothing is hidden, as the memory is in use
        ([dict(cycles=3 * 1.75e9, read=2765e9)], 3.0),  # it is idle for two seconds of three
        ([dict(links=600e9)], 2.0),  # a collective of one second hides one
    ],
)
def test_a_prefetch_overlaps_with_what_leaves_the_memory_idle(between, expected):
    second = 2765e9 / 2  # bytes of a second in two runs
    between = [{name: value / 2 for name, value in costs.items()} for costs in between]
    program = [
        *(instruction(name=f"copy.{n}", kind="copy", read=second) for n in (1, 2)),
        *(instruction(**costs) for costs in between),
        *(instruction(name=f"done.{n}", kind="wait", start=f"copy.{n}") for n in (1, 2)),
    ]
    calibration = estimate.Calibration(1.0, 1.0, 0.9)
    network = slice_of("v5p", 4, 4, 4)
    seconds = estimate.program_seconds(Traffic(tuple(program), (), ()), network, calibration)
    assert seconds == pytest.approx(expected)


def test_a_prefetch_that_is_waited_for_early_is_not_hidden_by_what_follows():
    network, calibration = slice_of("v5p", 4, 4, 4), estimate.Calibration(1.0, 1.0, 0.9)
    work = instruction(cycles=3 * 1.75e9 / 2)
    copies = [instruction(name=f"copy.{n}", kind="copy", read=2765e9 / 2) for n in (1, 2)]
    wait = instruction(name="done.2", kind="wait", start="copy.2")  # for the one before it, too

    def seconds(*program):
        return estimate.program_seconds(Traffic(program, (), ()), network, calibration)

    assert seconds(*copies, work, wait) == pytest.approx(3.0)
    assert seconds(*copies, wait, work) == pytest.approx(2.0 + 3.0)
    assert seconds(work, *copies) == pytest.approx(3.0 + 2.0)  # until the program ends


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([], 2.0),  # nothing hides the collective of two seconds
        ([dict(cycles=1.75e9 / 2)], 2.0),  # half a second of it is hidden
        ([dict(cycles=3 * 1.75e9)], 3.0),
        ([dict(read=2765e9)], 2.0),  # the memory is in use, the links are not
        ([dict(links=600e9)], 3.0),  # the links are in use
        ([dict(cycles=3 * 1.75e9, links=2 * 600e9)], 4.0),  # and idle for one second of three
    ],
)
def test_an_asynchronous_collective_overlaps_with_what_leaves_the_links_idle(between, expected):
    between = [{name: value / 2 for name, value in costs.items()} for costs in between]
    program = [
        instruction(name="start", kind="collective", links=600e9, asynchronous=True),
        *(instruction(**costs) for costs in between),
        instruction(name="done", kind="wait", start="start"),
        instruction(cycles=1.75e9 / 2),  # after its end
    ]
    calibration, network = estimate.Calibration(1.0, 1.0, 0.9), slice_of("v5p", 4, 4, 4)
    costs = Traffic(tuple(program), (), ())
    times = estimate.instruction_times(costs, network, calibration)
    assert sum(times) == pytest.approx(expected + 1.0)
    assert times[0] == 0 and times[-2] == pytest.approx(sum(times) - 1.0 - sum(times[1:-2]))


def test_a_gpu_states_no_cycles():
    chip = CHIPS["h100"]
    calibration = estimate.calibration(Traffic((instruction(flops=8192.0**3),), (), ()), chip)
    assert (calibration.cycles, calibration.efficiency) == (0.0, chip.product_share)
    assert calibration.seconds == pytest.approx(2 * 8192**3 / 706e12, rel=1e-3)
    for costs, seconds in ((dict(read=2957e9), 1.0), (dict(flops=706e12), 1.0)):
        one = estimate.instruction_seconds(instruction(**costs), gpus(1, 1), calibration.efficiency)
        assert one == pytest.approx(seconds, rel=1e-3)


def test_the_bound_is_the_larger_of_memory_and_products():
    chip = CHIPS["h100"]
    assert estimate.bound_seconds(3352e9, 1e12, chip) == pytest.approx(1.0)
    assert estimate.bound_seconds(1e9, 2 * 989e12, chip) == pytest.approx(2.0)
