"""How a run goes, whatever its passes: the options that every command which runs passes has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rewright.passes.spec import Opt


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
