"""Accelerators to plan for. Programs are compiled for them on a machine that has none.

    target = make_target("v5p:2x2x2")      8 chips on 2 hosts
    target = make_target("h100:1x8")       8 GPUs on 1 host

XLA's compilers for TPUs and GPUs are in libtpu and in the CUDA plugin, which work without devices.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax
from jax.experimental import topologies

from mmsr1_jax.config.errors import UserError

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator. JAX sees the two cores of a TPU v5p as one device.

    Attributes:
      name: Its name in a target.
      platform: `tpu` or `gpu`.
      peak_flops: FLOP/s of dense bfloat16 products, by the data sheet.
      bandwidth: Bytes/s of the main memory, by the data sheet.
      links: Bytes/s in one direction over all links to other devices of a host (GPU) or slice
        (TPU), by the data sheet.
      memory: Bytes that programs can use.
      clock: Cycles/s, in the unit of the compiler's cycles; 0 if it states none.
      num_links: Number of these links of a TPU: two for each axis of a slice.
      ring: Least length of an axis of a slice whose ends are linked; so are those of its multiples.
      network: Bytes/s in one direction between hosts, for each GPU.
      product_share: Share of the peak that a bare product reaches where the compiler states no
        cycles, measured.
      copy_share: Share of the bandwidth that copies reach, measured; 1 if it was not.
    """

    name: str
    platform: str
    peak_flops: float
    bandwidth: float
    links: float
    memory: float
    clock: float = 0.0
    num_links: int = 1
    ring: int = 1
    network: float = 0.0
    product_share: float = 1.0
    copy_share: float = 1.0

    @property
    def copy_bandwidth(self) -> float:
        """Bytes/s that copies read and write, which estimates assume of all instructions."""
        return self.copy_share * self.bandwidth


# Figures of TPUs: the pages of Cloud TPU (https://cloud.google.com/tpu/docs/v5p, /v5e, /v6e), which
# state links in both directions. Their memory is what the compiler allows a program, as it says
# when one does not fit. Clocks are not published: with these, the compiler's cycles of a bare
# product (`estimate.calibrate`) mean 90, 88 and 70 % of the peak. The same pages state the lengths
# from which on an axis is a ring: a cube of 4 x 4 x 4 of v5p, 16 of v5e and v6e.
# Figures of GPUs: NVIDIA's data sheets. Of their memory, XLA_PYTHON_CLIENT_MEM_FRACTION=0.92. The
# network between hosts is an assumption: that of NVIDIA's DGX, an adapter of 400 Gbit/s for each of
# the eight GPUs (400 GB/s for a host). Machines of a cloud may have less. `python -m tests.device`
# measured the shares on an H100, 706 TFLOP/s and 2,957 GB/s; an H200 is assumed to reach the same.
_ADAPTER = 400e9 / 8
_PRODUCTS, _COPIES = 0.714, 0.882
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e", platform="tpu", peak_flops=197e12, bandwidth=819e9, links=200e9,
            memory=15.75 * _GIB, clock=1.5e9, num_links=4, ring=16,
        ),
        Chip(
            name="v5p", platform="tpu", peak_flops=459e12, bandwidth=2765e9, links=600e9,
            memory=95.74 * _GIB, clock=1.75e9, num_links=6, ring=4,
        ),
        Chip(
            name="v6e", platform="tpu", peak_flops=918e12, bandwidth=1640e9, links=400e9,
            memory=31.25 * _GIB, clock=1.75e9, num_links=4, ring=16,
        ),
        Chip(
            name="h100", platform="gpu", peak_flops=989e12, bandwidth=3352e9, links=450e9,
            memory=0.92 * 84942979072, network=_ADAPTER, product_share=_PRODUCTS,
            copy_share=_COPIES,
        ),
        Chip(
            name="h200", platform="gpu", peak_flops=989e12, bandwidth=4800e9, links=450e9,
            memory=0.92 * 141e9, network=_ADAPTER, product_share=_PRODUCTS,
            copy_share=_COPIES,
        ),
    )
}  # fmt: skip
_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)+")
_EXTRAS = {"tpu": "tpu", "gpu": "cuda"}
_COMPILERS = {
    "tpu": ["libtpu"],
    "gpu": [
        *(f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt")),
        "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc",
    ],
}  # fmt: skip
_H100 = pathlib.Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: Name, such as `v5p:2x2x2`.
      chip: Kind of the devices.
      devices: Devices of all hosts, for a mesh. They cannot run programs.
    """

    name: str
    chip: Chip
    devices: list[Any]

    @property
    def num_hosts(self) -> int:
        """Number of hosts."""
        return len({device.process_index for device in self.devices})

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of the name: axes of a slice, or hosts and GPUs of a host."""
        return tuple(int(size) for size in self.name.partition(":")[2].split("x"))


def make_target(name: str) -> Target:
    """Return the target of a name: `v5p:2x2x2` (shape of the slice), `h100:1x8` (hosts x GPUs).

    Raises:
      UserError: The name is not that of a target, or the compiler for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not _SHAPE.fullmatch(shape):
        raise UserError(
            f"--topology={name}: must be a chip and a shape, such as v5p:2x2x2 or h100:1x8 "
            f"(hosts x GPUs); chips are {', '.join(CHIPS)}"
        )
    chip = CHIPS[kind]
    check_compiler(chip.platform)
    try:
        if chip.platform == "tpu":
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x{shape}",
                target_config=gpu_description(chip),
            )  # fmt: skip
    except (RuntimeError, ValueError, NotImplementedError) as error:  # with JAX's own among them
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={name}: {reason}") from None
    return Target(name, chip, list(topology.devices))


def compiler_versions(platform: str) -> list[str]:
    """Return the names and versions of the installed packages with the compiler for a platform."""
    result = []
    for package in _COMPILERS[platform]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result.append(f"{package} {importlib.metadata.version(package)}")
    return result


def check_compiler(platform: str) -> None:
    """Raise UserError unless the compiler for a platform is installed, and configure it.

    The settings take effect if JAX has not been initialised yet.
    """
    packages = ("libtpu",) if platform == "tpu" else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(
            f"compiling for a {platform.upper()} needs "
            f"{'libtpu' if platform == 'tpu' else 'the CUDA plugin of JAX'}, which is not "
            f'installed: pip install "mmsr1_jax[{_EXTRAS[platform]}]"'
        )
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu looks for no machine of a cloud
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # for any target; else it warns that it found none
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and holds no device
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver is needed
    }.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


def gpu_description(chip: Chip) -> str:
    """Return the description of a GPU for XLA's compiler."""
    text = _H100.read_text(encoding="utf-8")
    if chip.name == "h200":  # the processor of the H100 with another memory
        text = re.sub(r"device_memory_size: \d+", "device_memory_size: 141000000000", text)
        text = re.sub(r"memory_bandwidth: \d+", f"memory_bandwidth: {chip.bandwidth:.0f}", text)
        text = text.replace("H100 80GB HBM3", "H200")
    return text
