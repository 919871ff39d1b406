"""The machine as a run sees it: CPUs and devices, threads, memory, library versions."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import resource
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rewright.passes.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

    from rewright.passes.world import World

# What mallopt(3) calls its options, and from which size on a tensor gets pages of its own: large enough that the time
# a fresh page takes is nothing beside what is done with it.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 4 << 20

LIBRARIES = ("torch", "triton", "transformers", "safetensors", "compressed-tensors", "numpy")


def version() -> str:
    """Rewright's own version."""
    return metadata.version("rewright")


def libraries() -> dict[str, str]:
    """Versions of what can reach a result's bytes, and of Python."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def usable_cpus() -> int:
    """The CPUs this process may run on; in a container its share, where the system tells it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, _container_share(Path("/sys/fs/cgroup")) or count)


def _container_share(groups: Path) -> int | None:
    """The CPUs that a control group grants by time, rounded up; None where it sets no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (groups / "cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):
        limit, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.ceil(int(limit) / int(period)) if int(limit) > 0 else None
    return None


def find_device(wanted: str, world: World | None = None) -> torch.device:
    """The torch device for `--device`; of a world of several processes each takes a GPU of its machine by itself.

    Raises UsageError for an unknown word, ResourceError for an absent device.
    """
    import torch

    if wanted == "auto" and torch.cuda.is_available():
        if world is None or world.size == 1:
            return torch.device("cuda")
        return torch.device("cuda", world.local % torch.cuda.device_count())
    if wanted == "auto":
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"no device `{wanted}`", hint="say `cpu`, `cuda` or `cuda:N`")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device `{wanted}` is not there: this machine has {torch.cuda.device_count()} GPUs",
            hint="use `--device cpu`, or install a torch built for CUDA",
        )
    return device


def compute_dtype(rule: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of the model's forward under `--dtype`; sums of statistics stay float32 whatever it is."""
    import torch

    named = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if rule in named:
        return named[rule]
    return stored if device.type == "cuda" else torch.float32


def prepare(threads: int) -> None:
    """Make this process ready for tensors: torch at a set number of threads, and a heap that does not grow.

    Another number of threads rounds sums otherwise, and may change codes. Large tensors get pages of their own, which
    go back to the system with them: glibc learns to keep them on its heap, which then fills with gaps, a little more
    with each layer of a walk.
    """
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(_TRIM_THRESHOLD, 2 * LARGE_BYTES)


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it and can be told to (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_resident() -> int:
    """The most bytes of memory that this process has had."""
    with contextlib.suppress(OSError, StopIteration):
        # what the system counts for `getrusage` starts from the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
