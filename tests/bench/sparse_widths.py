"""From which width an MLP gains by its predictor on a CPU: `python -m tests.bench.sparse_widths --out docs/results`.

MLPs with ReLU of several widths, four times as many neurons, float32, one token on one thread, by a predictor of a
sixteenth of the width. Dense product and step are timed in turns, by the thread's own clock; weights take 64 MB in
copies, so that none stands in a cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from rewright.kernels.predictor_in import predictor_in
from rewright.kernels.predictor_out import active_neurons
from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.sparse_mlp import sparse_mlp
from tests.bench.harness import machine

WIDTHS, DENSITIES = (128, 256, 384, 512, 768, 1024, 2048), (0.08, 0.25)
COPIES, TIMES = 1 << 26, 60


@torch.inference_mode()
def measure(width: int, density: float) -> tuple[float, float]:
    """Seconds of the dense product, and of the step."""
    neurons, rank = 4 * width, max(16, width // 16)
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws) / shape[-1] ** 0.5

    count = max(2, COPIES // (8 * width * neurons))
    weights = [(random(neurons, width), random(neurons, width), random(neurons), random(width)) for _ in range(count)]
    predictors = [(random(rank, width), torch.zeros(rank), random(neurons, rank)) for _ in range(count)]
    x = torch.randn(1, width, generator=draws)
    # scores are about normal, so that this share of the neurons is past the threshold
    scores = predictor_in(x, *predictors[0][:2]) @ predictors[0][2].t()
    c = torch.full((neurons,), -float(torch.quantile(scores, 1 - density)))
    dense, step = [], []
    for turn in range(TIMES):
        up, down, bias, out = weights[turn % count]
        a, a0, b = predictors[turn % count]
        began = time.thread_time()
        torch.addmm(out, functional.relu(functional.linear(x, up, bias)), down)
        between = time.thread_time()
        index = active_neurons(predictor_in(x, a, a0), b, c)
        reduce_add(sparse_mlp(x, up, down, bias, index, None, "relu"), out, None, torch.float32)
        dense.append(between - began)
        step.append(time.thread_time() - between)
    return median(dense), median(step)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.sparse_widths", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for width in given.widths:
        for density in DENSITIES:
            dense, step = measure(width, density)
            rows.append({"width": width, "density": density, "dense": dense, "step": step})
    told = machine("cpu")
    lines = [
        "# Widths at which predictors pay\n",
        "An MLP with ReLU, four times as many neurons as it is wide, float32, one token on one thread; microseconds of",
        "the thread, medians of turns. A ratio past 1 is a gain.\n",
        "| width | density | dense | step | dense against step |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['width']:,} | {100 * row['density']:.0f} % | {1e6 * row['dense']:.0f} | {1e6 * row['step']:.0f} |"
        f" {row['dense'] / row['step']:.2f} x |"
        for row in rows
    ]
    lines += [
        "\nCommand: `python -m tests.bench.sparse_widths --out docs/results`\n",
        f"Machine: {', '.join(f'{key} {value}' for key, value in told.items())}\n",
    ]
    (given.out / "sparse-widths.json").write_text(json.dumps({"machine": told, "rows": rows}, indent=1) + "\n")
    (given.out / "sparse-widths.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
