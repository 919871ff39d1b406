"""Machines by name, each figure with its source."""

from __future__ import annotations

from typing import Any

from rewright.passes.flexgen_policy_search.machine import GIB, Machine, Published, reserve_of

_FITTED = "fitted by the authors on their runs, as in the released cost model"
_PAPER = "arXiv:2303.06865, section 6"
_T4 = Published(
    ctog=12.89 * GIB,
    gtoc_cache=0.97 * GIB,
    gtoc_hidden=4.82 * GIB,
    dtoc=0.473 * GIB,
    ctod_cache_p=0.746 * GIB,
    ctod_hidden_p=2.015 * GIB,
    ctod_g=2.015 * GIB,
    mm_p=21.24e12,
    mm_g=4.3e12,
    bmm_p=9.97e12,
    bmm_g=0.079e12,
    cpu=0.0123e12,
    c1=0.0168,
    c2=0.0328,
    c3=0.0621,
)


def _t4(name: str, dtoc: tuple[float, str], write: tuple[float, str], hbm: float | None) -> Machine:
    values = {field: getattr(_T4, field) for field in Published.__slots__}
    constants = Published(**{**values, "dtoc": dtoc[0], "hbm": hbm})
    return _machine(
        name,
        constants,
        gpu_bytes=(16 * GIB, _PAPER),
        cpu_bytes=(200 * GIB, "default of the released command, of 208 GB"),
        disk_bytes=(1500 * GIB, _PAPER),
        h2d=(12.89 * GIB, _FITTED),
        d2h=(4.82 * GIB, _FITTED),
        disk_read=dtoc,
        disk_write=write,
        dram=(60e9, "estimate for the 2 GHz Xeon of the paper, six channels of DDR4 at half rate"),
        hbm=(250e9, "NVIDIA T4 data sheet, 320 GB/s, at 78 %"),
        gpu_flops=(21.24e12, _FITTED),
        cpu_flops=(0.5e12, "estimate"),
        cpu_attn=(12.3e9, _FITTED),
    )


def _machine(name: str, published: Published | None, **figures: tuple[Any, str]) -> Machine:
    values = {key: value for key, (value, _) in figures.items()}
    return Machine(
        name=name,
        source="preset",
        gpu_reserve=reserve_of("gpu", values["gpu_bytes"]),
        cpu_reserve=reserve_of("cpu", values["cpu_bytes"]),
        published=published,
        sources=tuple(sorted((key, said) for key, (_, said) in figures.items())),
        **values,
    )


def _modern(name: str, **figures: tuple[Any, str]) -> Machine:
    shared = "estimate: a share of the DRAM rate, as a vectorised kernel reaches"
    return _machine(name, None, cpu_attn=(0.5 * figures["dram"][0], shared), **figures)


def preset(name: str) -> Machine:
    """The machine of a name in `values.PRESETS`. Raises KeyError."""
    return _MACHINES[name]


_PCIE5 = "PCIe 5.0 x16, 63 GB/s, at 84 %"
_PCIE4 = "PCIe 4.0 x16, 31.5 GB/s, at 80 %"
_NVME = "typical PCIe 4.0 NVMe drive"
_HOST = "estimate for a server host"
_DDR5 = "eight channels of DDR5-4800, 307 GB/s, at 65 %"
_MACHINES = {
    "t4-gcp-released": _t4("t4-gcp-released", (0.473 * GIB, _FITTED), (0.746 * GIB, _FITTED), None),
    "t4-gcp-paper": _t4(
        "t4-gcp-paper",
        (2.66 * GIB, "fitted to one published row, OPT-175B at a prompt of 512; the page cache is in it"),
        (0.93 * GIB, "the paper's 1 GB/s"),
        250e9,
    ),
    "h100-pcie5": _modern(
        "h100-pcie5",
        gpu_bytes=(80 * GIB, "NVIDIA H100 data sheet"),
        cpu_bytes=(512 * GIB, _HOST),
        disk_bytes=(4 * 10**12, _HOST),
        h2d=(53e9, _PCIE5),
        d2h=(53e9, _PCIE5),
        disk_read=(6.5e9, _NVME),
        disk_write=(4.5e9, _NVME),
        dram=(200e9, _DDR5),
        hbm=(1.6e12, "NVIDIA H100 PCIe data sheet, 2.0 TB/s, at 80 %"),
        gpu_flops=(450e12, "NVIDIA H100 PCIe data sheet, 756 TFLOP/s dense bfloat16, at 60 %"),
        cpu_flops=(3e12, _HOST),
    ),
    "h200-pcie5": _modern(
        "h200-pcie5",
        gpu_bytes=(141 * 10**9, "NVIDIA H200 data sheet"),
        cpu_bytes=(1024 * GIB, _HOST),
        disk_bytes=(8 * 10**12, _HOST),
        h2d=(53e9, _PCIE5),
        d2h=(53e9, _PCIE5),
        disk_read=(6.5e9, _NVME),
        disk_write=(4.5e9, _NVME),
        dram=(200e9, _DDR5),
        hbm=(4.0e12, "NVIDIA H200 data sheet, 4.8 TB/s, at 83 %"),
        gpu_flops=(650e12, "NVIDIA H200 data sheet, 989 TFLOP/s dense bfloat16, at 66 %"),
        cpu_flops=(3e12, _HOST),
    ),
    "rtx4090": _modern(
        "rtx4090",
        gpu_bytes=(24 * GIB, "NVIDIA data sheet"),
        cpu_bytes=(64 * GIB, "estimate for a desktop"),
        disk_bytes=(2 * 10**12, "estimate for a desktop"),
        h2d=(25e9, _PCIE4),
        d2h=(25e9, _PCIE4),
        disk_read=(6.5e9, _NVME),
        disk_write=(4.5e9, _NVME),
        dram=(60e9, "two channels of DDR5-5600, 90 GB/s, at 67 %"),
        hbm=(0.85e12, "NVIDIA data sheet, 1008 GB/s, at 84 %"),
        gpu_flops=(130e12, "NVIDIA data sheet, 165 TFLOP/s dense bfloat16, at 79 %"),
        cpu_flops=(1e12, "estimate for a desktop"),
    ),
    "laptop": _modern(
        "laptop",
        gpu_bytes=(8 * GIB, "NVIDIA data sheet, RTX 4060 Laptop"),
        cpu_bytes=(16 * GIB, "estimate for a laptop"),
        disk_bytes=(500 * 10**9, "estimate for a laptop"),
        h2d=(11e9, "PCIe 4.0 x8, 15.8 GB/s, at 70 %"),
        d2h=(11e9, "PCIe 4.0 x8, 15.8 GB/s, at 70 %"),
        disk_read=(3e9, "typical PCIe 4.0 drive of a laptop"),
        disk_write=(2e9, "typical PCIe 4.0 drive of a laptop"),
        dram=(45e9, "two channels of DDR5-4800, 77 GB/s, at 58 %"),
        hbm=(0.2e12, "NVIDIA data sheet, 256 GB/s, at 78 %"),
        gpu_flops=(30e12, "estimate at a laptop's power limit"),
        cpu_flops=(0.5e12, "estimate for a laptop"),
    ),
}
