"""Run a module of this folder in a process of its own, with Triton's interpreter on or off, and read its JSON."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def answer(module: str, *arguments: str, interpret: bool) -> Any:
    """What `python -m MODULE ARGUMENTS --json` prints; its exit code is left to the caller's assertions."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REWRIGHT_KERNELS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / ".src"), environment.get("PYTHONPATH", "")])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        raise AssertionError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)
