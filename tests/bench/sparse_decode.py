"""Decoding by the neurons that a predictor lists, on a CPU: `python -m tests.bench.sparse_decode --out docs/results`.

One MLP of the shape of OPT-1.3B's, float32, one thread, one token: predictor, list, listed neurons and their sum,
beside the dense product by both matrices. A step that lists more than the break-even share reads all neurons; a layer
of which no predictor is worth asking is left as it was. Every listed neuron is truly active, so that nothing is gained
by what a list has too much. Several copies of the weights and other lists each time keep caches from helping. All
contenders go in turns, and seconds are those of the thread, since other work on the machine comes and goes. Then where
listed neurons and all of them break even, for several rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from rewright.kernels.predictor_in import predictor_in
from rewright.kernels.predictor_out import active_neurons
from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.sparse_mlp import break_even, sparse_mlp, worth_asking
from tests.bench.harness import machine

DENSITIES = (0.05, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0)
SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
# So many tokens are gone through in turn.
TOKENS = 16


@dataclass(frozen=True)
class Block:
    """One copy of an MLP and its predictor; `last` is the second matrix as a linear module has it."""

    up: torch.Tensor
    bias: torch.Tensor
    down: torch.Tensor
    last: torch.Tensor
    last_bias: torch.Tensor
    a: torch.Tensor
    a0: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """What a transformers model does."""
        h = torch.relu(torch.nn.functional.linear(x, self.up, self.bias))
        return torch.nn.functional.linear(h, self.last, self.last_bias)

    def by_neurons(self, x: torch.Tensor) -> torch.Tensor:
        """The same from the second matrix as it is held for sparse steps."""
        h = torch.relu(torch.nn.functional.linear(x, self.up, self.bias))
        return torch.addmm(self.last_bias, h, self.down)

    def step(self, x: torch.Tensor, shift: float) -> torch.Tensor:
        """What a sparse step does: ask, and read the neurons that are listed, or all where those are too many."""
        neurons = self.predicted(x, shift)
        if len(neurons) > break_even(len(x)) * len(self.up):
            return self.by_neurons(x)
        return self.listed(x, neurons)

    def predicted(self, x: torch.Tensor, shift: float) -> torch.Tensor:
        """The neurons that the predictor lists."""
        return active_neurons(predictor_in(x, self.a, self.a0), self.b, self.c, shift)

    def listed(self, x: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """The sum over the neurons of a list."""
        partial = sparse_mlp(x, self.up, self.down, self.bias, neurons, None, "relu")
        return reduce_add(partial, self.last_bias, None, x.dtype)


def block(width: int, neurons: int, rank: int) -> Block:
    """Random weights, with biases that make every neuron active."""
    up, down = torch.randn(neurons, width) / width**0.5, torch.randn(neurons, width) / neurons**0.5
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(neurons, rank) / rank**0.5
    bias = torch.full((neurons,), 8.0)
    return Block(
        up, bias, down, down.t().contiguous(), torch.randn(width), a, torch.zeros(rank), b, torch.zeros(neurons)
    )


def in_turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of this thread that each call takes, round by round; the first two rounds are not counted."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        # nobody is always the first
        for place in list(range(len(calls)))[:: 1 if turn % 2 else -1]:
            started = time.thread_time()
            calls[place]()
            seconds = time.thread_time() - started
            if turn >= 2:
                taken[place].append(seconds)
    return taken


def rotating(
    call: Callable[[Block, torch.Tensor], object], blocks: list[Block], xs: torch.Tensor, at: int = 0
) -> Callable[[], object]:
    """A call that takes another copy and another token each time, from those after number `at` on."""

    def run() -> object:
        nonlocal at
        at += 1
        return call(blocks[at % len(blocks)], xs[at % len(xs)])

    return run


@torch.inference_mode()
def decoding(blocks: list[Block], density: float, rounds: int) -> dict[str, Any]:
    """Seconds of the dense product, of a step that lists about such a share of the neurons, and of its predictor."""
    xs = torch.randn(TOKENS, 1, blocks[0].up.shape[1])
    every = [(block, x) for block in blocks for x in xs]
    scores = torch.cat([predictor_in(x, block.a, block.a0) @ block.b.t() for block, x in every]).flatten()
    shift = -float(scores.kthvalue(max(1, round((1 - density) * len(scores)))).values) if density < 1 else 1e4
    shares = [len(block.predicted(x, shift)) / len(block.up) for block, x in every]
    listed = sum(shares) / len(shares)
    left = listed > worth_asking(1)
    calls: list[Callable[[Block, torch.Tensor], object]] = [
        Block.dense,
        lambda block, x: block.step(x, shift),
        lambda block, x: block.predicted(x, shift),
        # A layer that is left as it was is timed as any other, so that the noise is seen.
        Block.dense,
    ]
    # Nobody is given what the one before has read.
    turns = [rotating(call, blocks, xs, place) for place, call in enumerate(calls)]
    dense, step, predictor, again = in_turns(turns, rounds)
    return {
        "density": density,
        "listed": listed,
        "left_as_it_was": left,
        "dense": median(dense),
        "step": median(step),
        "step_quartiles": [quantiles(step, n=4)[place] for place in (0, 2)],
        "predictor": median(predictor),
        # round by round, so that what else ran does not count
        "step_times_faster": median(a / b for a, b in zip(dense, step, strict=True)),
        "times_faster": median(a / b for a, b in zip(dense, again if left else step, strict=True)),
    }


@torch.inference_mode()
def crossing(blocks: list[Block], rows: int, shares: Sequence[float], rounds: int) -> dict[str, Any]:
    """How long listed neurons take against all of them, by the share that is listed, and where the two are equal."""
    neurons, width = blocks[0].up.shape
    xs = torch.randn(TOKENS, rows, width)
    calls = [rotating(Block.by_neurons, blocks, xs)]
    for place, share in enumerate(shares, start=1):
        some = torch.randperm(neurons)[: round(share * neurons)].sort().values
        calls.append(rotating(lambda block, x, some=some: block.listed(x, some), blocks, xs, place))
    dense, *listed = in_turns(calls, rounds)
    against = [median(a / b for a, b in zip(times, dense, strict=True)) for times in listed]
    return {
        "rows": rows,
        "dense": median(dense),
        "against_dense": [list(pair) for pair in zip(shares, against, strict=True)],
        "break_even": equal(shares, against),
        "used": break_even(rows),
    }


def equal(shares: Sequence[float], against: Sequence[float]) -> float:
    """The first share at which the ratio is 1, on straight lines between those measured and from 0 at 0."""
    share, ratio = 0.0, 0.0
    for next_share, next_ratio in zip(shares, against, strict=True):
        if next_ratio > 1:
            return share + (1 - ratio) / (next_ratio - ratio) * (next_share - share)
        share, ratio = next_share, next_ratio
    return 1.0


def page(found: dict[str, Any]) -> str:
    shape = found["shape"]
    lines = [
        "# Decoding by listed neurons",
        "",
        f"One MLP with ReLU, width {shape['width']:,}, {shape['neurons']:,} neurons, float32, one token on one thread, "
        f"by a predictor of rank {shape['rank']}. A step asks the predictor, and reads the listed neurons, or all "
        f"where more than {break_even(1):.0%} are listed. A layer that lists more than {worth_asking(1):.0%} on "
        "the average is faster without a predictor, and left as it was. Every listed neuron is truly active. "
        "Milliseconds are those of the thread, in turns with the dense product by both matrices as transformers has "
        "them.",
        "",
        "| listed | dense, ms | step, ms (quartiles) | of it asking, ms | times faster | with layers left as they were "
        "|",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["decode"]:
        spread = " .. ".join(f"{1e3 * value:.2f}" for value in row["step_quartiles"])
        lines.append(
            f"| {row['listed']:.1%} | {1e3 * row['dense']:.2f} | {1e3 * row['step']:.2f} ({spread}) "
            f"| {1e3 * row['predictor']:.2f} | {row['step_times_faster']:.2f} x "
            f"| {row['times_faster']:.2f} x{', dense' if row['left_as_it_was'] else ''} |"
        )
    shares = [share for share, _ in found["break_even"][0]["against_dense"]]
    lines += [
        "",
        "Listed neurons against all of them, both from the second matrix as it is held by neurons, without the "
        "predictor: where they break even, and what `break_even` says.",
        "",
        f"| rows | all, ms | {' | '.join(f'{share:.0%} listed' for share in shares)} | equal at | used |",
        f"| --- | --- | {' | '.join('---' for _ in shares)} | --- | --- |",
    ]
    for row in found["break_even"]:
        ratios = " | ".join(f"{ratio:.2f}" for _, ratio in row["against_dense"])
        lines.append(
            f"| {row['rows']} | {1e3 * row['dense']:.2f} | {ratios} | {row['break_even']:.0%} | {row['used']:.0%} |"
        )
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*lines, "", f"Command: `{found['command']}`", "", f"Machine: {told}", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.sparse_decode", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--copies", type=int, default=3, help="of the weights, gone through in turn (3)")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the search for the break-even"
    )
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = [block(given.width, given.neurons, given.rank) for _ in range(given.copies)]
    found: dict[str, Any] = {
        "shape": {"width": given.width, "neurons": given.neurons, "rank": given.rank, "copies": given.copies},
        "decode": [decoding(blocks, density, given.rounds) for density in given.densities],
        "break_even": [
            crossing(blocks, rows, SHARES, max(2, given.rounds // (4 if rows > 1 else 2))) for rows in given.rows
        ],
        "machine": machine("cpu") | {"threads": 1},
        "command": "python -m tests.bench.sparse_decode --out docs/results",
    }
    if given.out is None:
        print(page(found))
        return 0
    (given.out / "sparse-decode.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "sparse-decode.md").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
