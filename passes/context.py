"""What a pass is handed besides its options and its checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from rewright.passes.errors import ResourceError, UsageError
from rewright.passes.spec import Opt
from rewright.passes.world import World, current

if TYPE_CHECKING:
    import torch

    from rewright.passes.inputs import Inputs
    from rewright.passes.journal import Journal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run goes, whatever its passes; one set for a whole chain. The key holds `seed` and `dtype` alone."""

    seed: Annotated[int, Opt("seed of everything that is drawn", min=0, max=2**63 - 1)] = 0
    device: Annotated[
        str, Opt("`auto`, `cpu`, `cuda` or `cuda:N`; auto takes a GPU when there is one", affects="speed")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "f32", "bf16", "f16"],
        Opt("arithmetic of the model's own layers; auto: as stored on a GPU, f32 on a CPU"),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "triton", "reference"],
        Opt("which implementation of each op; an explicit choice never falls back", affects="speed"),
    ] = "auto"
    threads: Annotated[
        int | None, Opt("CPU threads; by default the CPUs this process may use", min=1, max=1024, affects="speed")
    ] = None
    eval_text: Annotated[
        Path | None, Opt("text to score source and result on when the last pass is done", affects="speed")
    ] = None
    require: Annotated[
        tuple[str, ...],
        Opt(
            "a bound on a metric, as `perplexity_ratio<1.05`; missed: exit 5, nothing published",
            affects="speed",
        ),
    ] = ()
    dry_run: Annotated[bool, Opt("say what would be done and what it would take", affects="speed")] = False
    json: Annotated[bool, Opt("one JSON document on stdout", affects="speed")] = False
    events: Annotated[Path | None, Opt("file that takes one JSON line per event", affects="speed")] = None
    check: Annotated[bool, Opt("only answer: 0 up to date, 7 work to do", affects="speed")] = False
    update: Annotated[
        bool, Opt("replace a destination of ours that is out of date; do nothing otherwise", affects="speed")
    ] = False
    force: Annotated[bool, Opt("rebuild; replaces a destination of ours, drops partial work", affects="speed")] = False
    quiet: Annotated[bool, Opt("errors only", affects="speed", short="q")] = False
    verbose: Annotated[int, Opt("say more (-v), or everything (-vv)", affects="speed", short="v")] = 0


class Progress(Protocol):
    """A bar under way."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


class Reporter(Protocol):
    """Where a run talks: never on stdout."""

    def info(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def debug(self, text: str) -> None: ...
    def event(self, kind: str, **fields: Any) -> None: ...
    def progress(self, label: str, total: float | None) -> AbstractContextManager[Progress]: ...


class _SilentProgress:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


class Silent:
    """The reporter of library callers and tests: keeps warnings, drops the rest."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def debug(self, text: str) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        pass

    @contextmanager
    def progress(self, label: str, total: float | None) -> Iterator[Progress]:
        yield _SilentProgress()


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


def find_device(wanted: str) -> torch.device:
    """The torch device for `--device`; of several processes on a machine each takes a GPU of its own by itself.

    Raises UsageError for an unknown word, ResourceError for an absent device.
    """
    import torch

    if wanted == "auto" and torch.cuda.is_available():
        here = current()
        return torch.device("cuda", here.local % torch.cuda.device_count()) if here.size > 1 else torch.device("cuda")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A stage under way. `work` is the stage's own folder for scratch files, gone when the stage is done.

    `world` has the processes that share the stage; a pass that does not split its work is given one process.
    """

    seed: int
    device: torch.device
    dtype: str
    threads: int
    reporter: Reporter
    journal: Journal
    inputs: Inputs
    work: Path
    world: World = field(default_factory=World)
