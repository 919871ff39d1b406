"""`python -m tests.bench OP --json`: time an op on this machine's GPU, or on its CPU with the reference."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.bench.harness import Job, RedError, gate, machine, measure
from tests.kernels.ops import OPS


def main(arguments: list[str] | None = None) -> int:
    """Print the times; 1 when the op is not conformant here and so not timed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Time one op beside a peer.")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each call is repeated (0.5)")
    parser.add_argument("--profile", action="store_true", help="print where the last shape's time goes, to stderr")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    choice = "triton" if given.device == "cuda" else "reference"
    try:
        passed = gate(given.op, choice, given.device)
    except RedError as red:
        print(f"error: {red}", file=sys.stderr)
        return 1
    make: Callable[[str], list[Job]] = importlib.import_module(f"tests.bench.{given.op}").jobs
    jobs = make(given.device)
    report = {
        "op": given.op,
        "kernels": choice,
        "machine": machine(given.device),
        "threads": given.threads,
        "conformant_cases": passed,
        **measure(jobs, choice, given.device, given.seconds),
    }
    print(json.dumps(report, indent=2) if given.json else table(report))
    if given.profile:
        print(profile(jobs[-1], given.device), file=sys.stderr)
    return 0


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['op']} ({report['kernels']}) on {report['machine']['device']}, {report['threads']} thread(s)"]
    lines.append(f"{'shape':34}{'median':>11}{'quartiles':>23}{'rate':>14}{'ceiling':>9}{'against peer':>14}")
    for row in report["rows"]:
        middle = row["seconds"]
        quartiles = " .. ".join(f"{1e3 * value:.3f}" for value in middle["quartiles"])
        rate = (
            f"{row['gigabytes_per_second']:.2f} GB/s"
            if "gigabytes_per_second" in row
            else f"{row['teraflops']:.3f} TF/s"
        )
        lines.append(
            f"{row['shape']:34}{1e3 * middle['median']:8.3f} ms{quartiles:>20} ms{rate:>14}"
            f"{row['fraction_of_ceiling']:9.0%}{row['times_faster_than_peer']:13.2f}x"
        )
    lines.append(f"peer: {report['rows'][0]['peer']['name']}")
    return "\n".join(lines)


def profile(job: Job, device: str) -> str:
    """The ten costliest torch calls of a job."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=kinds) as found:
        for _ in range(10):
            job.call()
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=30))


if __name__ == "__main__":
    sys.exit(main())
