"""How well a calibration foretells: `python -m tests.bench.calibrate --out docs/results`.

`rewright bench --calibrate` several times over; of each the twelve times that nothing was fitted to, and of the first
what the others find otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from tests.bench.harness import machine


def once(folder: Path, threads: int) -> dict[str, Any]:
    """One calibration as the command tells it."""
    words = ["rewright", "bench", "--calibrate", str(folder / "box.toml"), "--threads", str(threads), "--json"]
    told = subprocess.run([*words, "--quiet"], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(told)
    return {key: value for key, value in found.items() if key != "machine"}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs = found["runs"]
    off = ", ".join(f"{100 * run['holdout']:.1f} %" for run in runs)
    lines = [
        "# A machine measured",
        "",
        f"`rewright bench --calibrate`, {len(runs)} times over, {median(run['seconds'] for run in runs):.0f} s each:"
        f" {runs[0]['how']}. Work that no figure was fitted to differs from what the roofline says of it by {off} in"
        " the mean.",
        "",
        "| not fitted to | measured, ms | foretold, ms | off by |",
        "| --- | ---: | ---: | ---: |",
    ]
    for number, one in enumerate(runs[0]["held_out"]):
        again = [run["held_out"][number] for run in runs]
        measured, foretold = (median(row[key] for row in again) for key in ("measured_s", "foretold_s"))
        errors = ", ".join(f"{100 * (row['foretold_s'] / row['measured_s'] - 1):+.1f}" for row in again)
        lines.append(f"| {one['name']} | {1e3 * measured:.3f} | {1e3 * foretold:.3f} | {errors} % |")
    lines += [
        "",
        "| figure | median | spread |",
        "| --- | ---: | ---: |",
    ]
    for name in runs[0]["rates"]:
        values = [run["rates"][name] / run["busy"].get(name, 1.0) for run in runs]
        spread = 100 * (max(values) - min(values)) / fmean(values)
        lines.append(f"| {name} | {median(values):.4g} | {spread:.0f} % |")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    lines += [
        "",
        "Rates are in bytes or operations a second, alone; `launch_s` and `copy_s` in seconds.",
        "",
        "Command: `python -m tests.bench.calibrate --out docs/results`",
        "",
        f"Machine: {told}",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for calibrate.json and calibrate.md")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    found: dict[str, Any] = {"runs": [], "machine": machine("cuda" if torch.cuda.is_available() else "cpu")}
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        for number in range(given.runs):
            found["runs"].append(once(Path(folder), given.threads))
            print(number, f"{100 * found['runs'][-1]['holdout']:.1f} %", flush=True)
    (given.out / "calibrate.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "calibrate.md").write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
