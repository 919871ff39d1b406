"""`bench --calibrate`: this machine measured, and written down for `flexgen-policy-search --machine`."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from rewright.cli import console
from rewright.cli.console import table
from rewright.cli.figures import figure
from rewright.formats.files import write_file
from rewright.passes.errors import InputError, UsageError
from rewright.passes.run_options import RunOptions


def calibrate(target: Path, run: RunOptions) -> None:
    """Measure, write, and tell what was found. Raises UsageError for a file that this did not write."""
    import torch

    from rewright.passes.flexgen_policy_search import calibrate as measured
    from rewright.passes.flexgen_policy_search import machine_file
    from rewright.passes.machine import compute_dtype, find_device, prepare, usable_cpus

    _free(target)
    device, threads = find_device(run.device), run.threads or usable_cpus()
    prepare(threads)
    speaker = console.current()
    found = measured.calibrate(
        target.parent,
        device,
        compute_dtype(run.dtype, device, torch.bfloat16),
        threads,
        told=lambda step: speaker.info(f"measuring {step}"),
    )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_file(target, machine_file.encode(found.machine, at=today, how=found.how))
    rates = {name: getattr(found.machine, name) for name in (*found.machine.rates, "launch_s", "copy_s")}
    if run.json:
        console.write_json(
            {
                "machine": target,
                "how": found.how,
                "seconds": found.seconds,
                "rates": rates,
                "busy": dict(found.machine.busy),
                "products": {f"{rows}": share for rows, share in found.machine.gemm},
                "held_out": [
                    {"name": one.name, "measured_s": one.measured, "foretold_s": one.foretold} for one in found.held
                ],
                "holdout": found.machine.holdout,
            }
        )
        return
    console.write(table(_rows(rates, dict(found.machine.busy)), head=("", "alone", "with all else")))
    console.write("")
    rows = [
        (one.name, f"{1e3 * one.measured:.3f}", f"{1e3 * one.foretold:.3f}", f"{100 * one.error:+.1f} %")
        for one in found.held
    ]
    console.write(table(rows, head=("not fitted to", "ms", "foretold", "off by")))
    console.write(f"\noff by {100 * (found.machine.holdout or 0):.1f} % in the mean; in {console.safe(str(target))}")


def _free(target: Path) -> None:
    """Refuse to replace what this did not write."""
    from rewright.passes.flexgen_policy_search import machine_file

    if target.suffix != ".toml":
        raise UsageError(f"`--calibrate` writes a .toml file, not `{target}`")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder `{target.parent}` to write `{target.name}` to")
    if target.exists():
        try:
            ours = machine_file.parse(target.read_bytes(), target).source == "measured"
        except (OSError, InputError):
            ours = False
        if not ours:
            raise UsageError(f"`{target}` is there, and no calibration", hint="name another file")


def _rows(rates: dict[str, float], busy: dict[str, float]) -> Iterator[tuple[str, str, str]]:
    for name, value in rates.items():
        unit = "s" if name.endswith("_s") else "operations/s" if name.endswith("flops") else "bytes/s"
        left = busy.get(name)
        word = name.removesuffix("_s").replace("_", " ")
        yield word, f"{figure(value / (left or 1.0))} {unit}", f"{100 * left:.0f} %" if left else ""
