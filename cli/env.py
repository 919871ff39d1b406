"""`env`: the facts a bug report needs."""

from __future__ import annotations

import importlib.util
import pkgutil
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import typer

from rewright.cli import console, environment
from rewright.cli.build import command
from rewright.cli.console import table
from rewright.cli.figures import size
from rewright.passes.machine import usable_cpus
from rewright.passes.run_options import RunOptions

LIBRARIES = (
    "rewright",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "compressed-tensors",
    "accelerate",
    "numpy",
    "scipy",
    "typer",
    "rich",
)


def version_of(name: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Versions, devices, threads, the kernels' backends, and the switches that are set. Imports torch."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        gpus.append({"name": about.name, "bytes": about.total_memory, "capability": f"{about.major}.{about.minor}"})
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": {"usable": usable_cpus(), "torch_threads": torch.get_num_threads(), "machine": platform.machine()},
        "kernels": kernels(has_gpu=bool(gpus)),
        "interpreter": environment.value(environment.INTERPRET) not in ("", "0"),
        "switches": {
            switch.name: environment.value(switch) for switch in environment.SWITCHES if environment.value(switch)
        },
    }


def kernels(*, has_gpu: bool) -> dict[str, str]:
    """The implementation each op takes here: what was asked for, else Triton where there is a GPU to run it."""
    from rewright.kernels.dispatch import mode

    auto = "triton" if has_gpu and importlib.util.find_spec("triton") else "reference"
    return {name: auto if mode() == "auto" else mode() for name in operations()}


def operations() -> list[str]:
    """The names of the ops: the packages in `kernels`."""
    import rewright.kernels

    return sorted(item.name for item in pkgutil.iter_modules(rewright.kernels.__path__) if item.ispkg)


def env(run: RunOptions) -> None:
    """Print versions, devices, threads and kernel backends: the text for a bug report.

    Example: rewright env --json
    """
    found = facts()
    if run.json:
        console.write_json(found)
    else:
        console.write(table(_rows(found)))


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "python", f"{found['python']} ({found['executable']})"
    yield "platform", found["platform"]
    for name, version in found["libraries"].items():
        yield name, version or "not installed"
    yield "cuda", found["cuda"] or "torch is built without it"
    for number, gpu in enumerate(found["gpus"]):
        yield f"gpu {number}", f"{gpu['name']}, {size(gpu['bytes'])}, compute capability {gpu['capability']}"
    if not found["gpus"]:
        yield "gpu", "none"
    yield "cpu", f"{found['cpu']['usable']} usable, torch runs {found['cpu']['torch_threads']} threads"
    for name, backend in found["kernels"].items():
        yield f"kernel {name}", backend
    yield "triton interpreter", "on" if found["interpreter"] else "off"
    for name, value in found["switches"].items():
        yield name, value


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "env", run=("json",), rich_help_panel="Look")(env)
