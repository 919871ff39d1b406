"""A machine as the search sees it: three tiers, and what moves and computes between them. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GIB, MIB = 2**30, 2**20
# What a CUDA context and an allocator take of a GPU, and a system of a host, beside a share of the whole.
GPU_RESERVE, GPU_SHARE = 768 * MIB, 0.03
CPU_RESERVE, CPU_SHARE = 2 * GIB, 0.10


@dataclass(frozen=True, slots=True)
class Published:
    """Constants of the published equations: bytes a second and operations a second (FlexGen, arXiv:2303.06865, A.3).

    `hbm` is the bandwidth of the GPU's memory, which the published equations do not have: None leaves it out.
    """

    ctog: float
    gtoc_cache: float
    gtoc_hidden: float
    dtoc: float
    ctod_cache_p: float
    ctod_hidden_p: float
    ctod_g: float
    mm_p: float
    mm_g: float
    bmm_p: float
    bmm_g: float
    cpu: float
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    hbm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes of each tier and what of it is not to be had; rates in bytes, operations and seconds.

    `h2d` and `d2h` are copies between host and GPU while all else runs, `cpu_attn` the keys and values that attention
    on the CPU reads a second, `launch_s` what a kernel costs to start and `copy_s` a copy. What `None` is said of is
    as fast as all else there: `gpu_attn` as `hbm`, attention's arithmetic as any. `gemm` gives for a number of rows
    the share of `gpu_flops` that a product reaches; without it every product reaches all. `busy` says of copies and
    disk what share of their rates alone is left while all else runs, which the rates have in them. `sources` says of
    each figure where it is from, `holdout` by how much measured times differ from foretold ones in the mean.
    """

    name: str
    source: str
    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int
    gpu_reserve: int
    cpu_reserve: int
    h2d: float
    d2h: float
    disk_read: float
    disk_write: float
    dram: float
    hbm: float
    gpu_flops: float
    cpu_flops: float
    cpu_attn: float
    launch_s: float = 5e-6
    copy_s: float = 1e-5
    gpu_attn: float | None = None
    gpu_attn_flops: float | None = None
    cpu_attn_flops: float | None = None
    gemm: tuple[tuple[int, float], ...] = ()
    busy: tuple[tuple[str, float], ...] = ()
    published: Published | None = None
    holdout: float | None = None
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    RATES = ("h2d", "d2h", "disk_read", "disk_write", "dram", "hbm", "gpu_flops", "cpu_flops", "cpu_attn")
    OPTIONAL = ("gpu_attn", "gpu_attn_flops", "cpu_attn_flops")
    TIERS = ("gpu", "cpu", "disk")

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates that this machine has."""
        return (*self.RATES, *(name for name in self.OPTIONAL if getattr(self, name) is not None))

    @property
    def rooms(self) -> dict[str, int]:
        """The bytes of each tier that may be used."""
        return {
            "gpu": max(0, self.gpu_bytes - self.gpu_reserve),
            "cpu": max(0, self.cpu_bytes - self.cpu_reserve),
            "disk": self.disk_bytes,
        }

    def sized(self, sizes: Mapping[str, int | None]) -> Machine:
        """The machine with other sizes of its tiers; reserves are in proportion, but one that was described stays."""
        gpu, cpu, disk = (sizes.get(tier) for tier in self.TIERS)
        made = self
        if gpu is not None:
            made = replace(made, gpu_bytes=gpu, gpu_reserve=self.reserve("gpu", gpu))
        if cpu is not None:
            made = replace(made, cpu_bytes=cpu, cpu_reserve=self.reserve("cpu", cpu))
        return made if disk is None else replace(made, disk_bytes=disk)

    def reserve(self, tier: str, size: int) -> int:
        """What would not be to be had of a tier of another size."""
        have, kept = (getattr(self, f"{tier}_{what}", 0) for what in ("bytes", "reserve"))
        return kept if tier == "disk" or kept != reserve_of(tier, have) else reserve_of(tier, size)

    def constants(self) -> Published:
        """Constants for the published equations, from the rates where none were fitted."""
        if self.published is not None:
            return self.published
        return Published(
            ctog=self.h2d,
            gtoc_cache=self.d2h,
            gtoc_hidden=self.d2h,
            dtoc=self.disk_read,
            ctod_cache_p=self.disk_write,
            ctod_hidden_p=self.disk_write,
            ctod_g=self.disk_write,
            mm_p=self.gpu_flops,
            mm_g=self.gpu_flops,
            bmm_p=self.gpu_flops,
            bmm_g=self.hbm,
            cpu=self.cpu_attn,
        )


def reserve_of(tier: str, size: int) -> int:
    """What of a tier's bytes is not to be had: a share and a fixed part, of a small tier half at most."""
    fixed, share = (GPU_RESERVE, GPU_SHARE) if tier == "gpu" else (CPU_RESERVE, CPU_SHARE)
    return min(size // 2, fixed + int(size * share))
