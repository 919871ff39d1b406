"""Memory that the losses of a linear head take, beside torch with all logits: `python -m tests.bench.head_memory`.

Each way runs in a process of its own, on a CPU, with hidden states and matrix already there. What the process has at
most while loss and gradient are computed, less what it has before, is what the way takes: the gradients are in it.
At the sizes given by default torch takes 3.2 GB beside 0.6 GB of inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.bench import linear_cross_entropy, linear_kl
from tests.bench.linear_cross_entropy import Loss

WAYS = ("fused", "plain")


def main(arguments: list[str] | None = None) -> int:
    """Print bytes and their ratio; a child prints its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.head_memory", description="Memory beside all logits.")
    parser.add_argument("--op", choices=("linear_cross_entropy", "linear_kl"), default="linear_cross_entropy")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--both", action="store_true", help="the matrix wants a gradient too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.way:
        torch.set_num_threads(given.threads)
        size = given.tokens, given.width, given.vocabulary
        print(growth(given.op, given.way, size, given.both))
        return 0
    words = [f"--{name}={getattr(given, name)}" for name in ("op", "tokens", "width", "vocabulary", "threads")]
    words += ["--both"] if given.both else []
    taken = {way: int(_child([*words, "--way", way])) for way in WAYS}
    logits = given.tokens * given.vocabulary * 4
    report = {**vars(given), "bytes": taken, "logits": logits, "ratio": taken["fused"] / taken["plain"]}
    if given.json:
        print(json.dumps({name: value for name, value in report.items() if name not in ("json", "way")}, indent=2))
        return 0
    print(f"{given.op}, {given.tokens} x {given.width} by {given.vocabulary}: logits of {logits / 1e6:.0f} MB")
    print(f"op {taken['fused'] / 1e6:.0f} MB, torch {taken['plain'] / 1e6:.0f} MB, ratio {report['ratio']:.3f}")
    return 0


def _child(words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.head_memory", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def growth(op: str, way: str, size: tuple[int, int, int], both: bool) -> int:
    """Bytes that the loss and its gradients take in this process; `size` is tokens, width and vocabulary."""
    # Libraries, threads and their buffers are there before.
    _run(_loss(op, way, 3, 80), torch.ones(3, 2), torch.ones(80, 2), both)
    tokens, width, vocabulary = size
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width).div_(width**0.5)
    loss = _loss(op, way, tokens, vocabulary)
    # Linux starts the high-water mark again from what is there now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    _run(loss, hidden, weight, both)
    return _peak() - before


def _loss(op: str, way: str, tokens: int, vocabulary: int) -> Loss:
    if op == "linear_kl":
        return linear_kl.pair(*linear_kl.likeliest(tokens, vocabulary, "cpu"), None)[WAYS.index(way)]
    targets = torch.randint(0, vocabulary, (tokens,))
    return linear_cross_entropy.pair(targets, None)[WAYS.index(way)]


def _run(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, both: bool) -> None:
    hidden.requires_grad_()
    weight.requires_grad_(both)
    torch.autograd.backward(loss(hidden, weight))


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
