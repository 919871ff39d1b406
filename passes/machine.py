"""The machine as a run sees it: threads and library versions."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
from importlib import metadata
from pathlib import Path

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
