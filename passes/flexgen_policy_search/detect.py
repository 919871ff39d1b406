"""What this machine has, without measuring it: memory and disk from the system, rates from data sheets."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewright.passes.flexgen_policy_search.machine import GIB, Machine, reserve_of
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.machine import usable_cpus

# Presets by what a GPU calls itself; the first that is found in the name.
_CARDS = (("H200", "h200-pcie5"), ("H100", "h100-pcie5"), ("RTX", "rtx4090"), ("T4", "t4-gcp-paper"))
_CARD_SHEET = "the preset for the card that was found"
# A core's arithmetic in 32 bits and its share of the memory's bandwidth, where nothing was measured.
_CORE_FLOPS, _CORE_BYTES, _MOST_BYTES = 30e9, 5e9, 60e9


def detect(folder: Path) -> Machine:
    """This machine, with `folder` on its disk. A machine without a GPU lends half of its memory to that part."""
    host, free = memory(), _disk(folder)
    card = _card()
    seen = {"cpu_bytes": "what the system says", "disk_bytes": "what is free, in whole GiB"}
    if card is not None:
        name, held = card
        known = next((word for part, word in _CARDS if part in name), "laptop")
        base = preset(known).sized({"gpu": held, "cpu": host, "disk": free})
        sources = {**{field: f"{_CARD_SHEET}: {said}" for field, said in base.sources}, **seen}
        sources["gpu_bytes"] = "what the driver says"
        return replace(base, name=name, source="detected", sources=tuple(sorted(sources.items())), published=None)
    cores = usable_cpus()
    rate = min(_MOST_BYTES, cores * _CORE_BYTES)
    guess = f"guessed from {cores} cores"
    figures: dict[str, Any] = {
        "h2d": rate / 2,
        "d2h": rate / 2,
        "dram": rate,
        "hbm": rate,
        "gpu_flops": cores * _CORE_FLOPS,
        "cpu_flops": cores * _CORE_FLOPS,
        "cpu_attn": rate / 2,
        "disk_read": 1e9,
        "disk_write": 0.5e9,
    }
    sources = {**dict.fromkeys(figures, guess), **seen, "gpu_bytes": "half of the memory: there is no GPU"}
    return Machine(
        name=f"{cores} cores, no GPU",
        source="detected",
        gpu_bytes=host // 2,
        cpu_bytes=host - host // 2,
        disk_bytes=free,
        gpu_reserve=reserve_of("gpu", host // 2),
        cpu_reserve=reserve_of("cpu", host - host // 2),
        sources=tuple(sorted(sources.items())),
        **figures,
    )


def memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(whole, int(Path(file).read_text()))
    return whole


def _disk(folder: Path) -> int:
    """Bytes that are free on the disk that a folder is on, rounded so that two looks mostly agree."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    return max(GIB, free // GIB * GIB)


def _card() -> tuple[str, int] | None:
    """Name and bytes of the first GPU, as NVIDIA's own tool tells them; None where there is none."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout
        found = re.match(r"(.+), (\d+)", told)
        if found:
            return found[1].strip(), int(found[2]) * 2**20
    return None
