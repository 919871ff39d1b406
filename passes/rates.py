"""Seconds from operations and bytes, by rates measured on this machine once and kept."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

from rewright.formats.errors import StorageError
from rewright.formats.files import write_file
from rewright.passes.machine import find_device, prepare, usable_cpus
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Estimate


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("rewright")) / "rates.json"


def _measure(device: Any) -> dict[str, float]:
    """Floating-point operations a second in a matrix product, and bytes a second in a copy."""
    import torch

    def clock(action: Any, repeat: int) -> float:
        # the best of several: what else runs on the machine only takes away
        best = math.inf
        for _ in range(repeat + 1):
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        return best

    side = 4096 if device.type == "cuda" else 512
    left = torch.ones(side, side, device=device)
    block = torch.ones(32 << 20, dtype=torch.uint8, device=device)
    return {
        "flops": 2 * side**3 / clock(lambda: left @ left, 20),
        "bytes": 2 * block.numel() / clock(block.clone, 20),
    }


def _rates(options: RunOptions) -> dict[str, float]:
    import torch

    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    threads = options.threads or usable_cpus()
    key = f"{platform.node()} {name or platform.machine()} {threads} {torch.__version__}"
    known: Any = None
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(_cache().read_bytes())
    known = known if isinstance(known, dict) else {}
    found = known.get(key)
    if isinstance(found, dict) and all(isinstance(found.get(of), float) and found[of] > 0 for of in ("flops", "bytes")):
        return found
    prepare(threads)
    known[key] = _measure(device)
    # a cache: where it cannot be kept, the next dry run measures again
    with contextlib.suppress(StorageError):
        write_file(_cache(), json.dumps(known).encode())
    return dict(known[key])


def timed(guess: Estimate, options: RunOptions) -> tuple[float, dict[str, Any]]:
    """The seconds of a stage, and its details with those of each of its `parts`, where it tells any.

    Operations and bytes at this machine's rates, one after the other: a guide, not a promise.
    """
    rates = _rates(options)
    details = dict(guess.details)
    if "parts" in details:
        details["parts"] = [
            {**part, "seconds_estimated": _seconds(rates, part["flops"], part["bytes_moved"])}
            for part in details["parts"]
        ]
    return _seconds(rates, guess.flops, guess.bytes_moved), details


def _seconds(rates: dict[str, float], flops: float, moved: float) -> float:
    return round(flops / rates["flops"] + moved / rates["bytes"], 3)
