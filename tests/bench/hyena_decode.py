"""Decoding with a distilled Hyena model: `python -m tests.bench.hyena_decode MODEL... --out docs/results`.

For each checkpoint that `rewright hyena-distill` wrote: logits of the recurrence against those of the convolution, for
several splits of a prompt; seconds a token after a short and a long prompt, measured in turns, since other work on the
machine comes and goes; the same by convolution, which reads all tokens again; bytes of the state beside the keys and
values of a transformer of that shape; and what a process holds at most that reads prompts of two lengths, each in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import DynamicCache

from rewright.passes.loading import load
from rewright.passes.machine import peak_resident
from rewright.passes.models.running import cache_bytes
from tests.bench.harness import machine

TEXT = Path(__file__).resolve().parents[1] / "data" / "tinystories_heldout.txt"
SPLITS: dict[str, tuple[int, ...]] = {
    "all at once": (),
    "half and half": (1000,),
    "pieces of 7": tuple(range(7, 2000, 7)),
    "one token after 1,000": tuple(range(1000, 2000)),
    "one token at a time": tuple(range(1, 2000)),
}


def some_tokens(model: Any, tokenizer: Any | None, count: int) -> torch.Tensor:
    """A text as often as it takes, (1, count); without a tokenizer random tokens."""
    if tokenizer is None:
        return torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    if model.config.model_type == "hyenadna":
        letters = torch.randint(4, (min(count, 100_000),), generator=torch.Generator().manual_seed(0))
        ids = tokenizer("".join("ACGT"[letter] for letter in letters), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids).repeat(-(-count // len(ids)))[None, :count]


@torch.inference_mode()
def agreement(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The largest difference of any logit, for every split."""
    expected = model(input_ids=ids, use_cache=False).logits
    found = {}
    for name, cuts in SPLITS.items():
        cuts = tuple(cut for cut in cuts if cut < ids.shape[1])
        cache, worst = DynamicCache(config=model.config), 0.0
        for first, last in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            logits = model(input_ids=ids[:, first:last], cache=cache, use_cache=True).logits
            worst = max(worst, float((logits - expected[:, first:last]).abs().max()))
        found[name] = worst
    return {"tokens": ids.shape[1], "largest_logit": float(expected.abs().max()), "largest_difference": found}


class _Writer:
    """Greedy decoding after a prompt."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.token = self._next(ids)

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        read = self.model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        token: torch.Tensor = read.logits[:, -1:].argmax(-1)
        return token

    def write(self, count: int) -> tuple[float, float]:
        """Seconds a token, and seconds of this thread."""
        started, own = time.perf_counter(), time.thread_time()
        for _ in range(count):
            self.token = self._next(self.token)
        return (time.perf_counter() - started) / count, (time.thread_time() - own) / count


@torch.inference_mode()
def decoding(model: Any, ids: torch.Tensor, positions: Sequence[int], rounds: int, count: int) -> list[dict[str, Any]]:
    """Seconds a token after prompts of several lengths, in turns; bytes of what is kept."""
    writers = {position: _Writer(model, ids[:, :position]) for position in positions}
    taken: dict[int, list[tuple[float, float]]] = {position: [] for position in positions}
    for writer in writers.values():
        writer.write(count)
    for turn in range(rounds):
        # neither is always the first
        for position in list(positions)[:: 1 if turn % 2 else -1]:
            taken[position].append(writers[position].write(count))
    config = model.config
    return [
        {
            "position": position,
            "seconds": median(wall for wall, _ in taken[position]),
            "own_seconds": median(own for _, own in taken[position]),
            "own_quartiles": [quantiles([own for _, own in taken[position]], n=4)[place] for place in (0, 2)],
            # round by round, so that what else ran does not count
            "against_first": median(
                own / first for (_, own), (_, first) in zip(taken[position], taken[positions[0]], strict=True)
            ),
            "state_bytes": cache_bytes(writers[position].cache),
            # bfloat16, a key and a value as wide as the model in every layer
            "key_value_bytes": 4 * config.n_layer * config.d_model * position,
        }
        for position in positions
    ]


@torch.inference_mode()
def convolving(model: Any, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds that one token takes when all are convolved again."""
    seconds, own = [], []
    for _ in range(rounds):
        started, mine = time.perf_counter(), time.thread_time()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        seconds.append(time.perf_counter() - started)
        own.append(time.thread_time() - mine)
    return {"position": ids.shape[1], "seconds": median(seconds), "own_seconds": median(own)}


@torch.inference_mode()
def prefill(path: Path, length: int, threads: int) -> dict[str, Any]:
    """Seconds and memory of reading a prompt, in this process; memory is above what it held with the model loaded."""
    torch.set_num_threads(threads)
    model, _ = load(path)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids[:, :2], use_cache=False)
    before, started = peak_resident(), time.perf_counter()
    _Writer(model, ids)
    return {"tokens": length, "seconds": time.perf_counter() - started, "mib": (peak_resident() - before) / 2**20}


def study(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All that the page says of one checkpoint. Raises ValueError for one that was not distilled."""
    model, tokenizer = load(path)
    if getattr(model.config, "modal", None) is None:
        raise ValueError(f"`{path}` is not distilled")
    config = model.config
    ids = some_tokens(model, tokenizer, max(given.tokens, *given.positions))
    found = {
        "model": path.name,
        "model_type": config.model_type,
        "layers": config.n_layer,
        "width": config.d_model,
        "entries": config.modal["entries"],
        "agreement": agreement(model, ids[:, : given.tokens]),
        "decode": decoding(model, ids, given.positions, given.rounds, given.count),
        "convolution": convolving(model, some_tokens(model, tokenizer, given.convolve), given.convolutions),
        "prefill": [],
    }
    for length in given.prefill:
        words = [sys.executable, "-m", "tests.bench.hyena_decode", str(path), "--read", str(length)]
        done = subprocess.run([*words, "--threads", str(given.threads)], check=True, capture_output=True, text=True)
        found["prefill"].append(json.loads(done.stdout))
    return found


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Decoding with a distilled Hyena model",
        "",
        "| model | layers x width | entries | recurrence against convolution, largest difference of a logit |",
        "| --- | --- | --- | --- |",
    ]
    for row in found["models"]:
        same = row["agreement"]
        worst = "; ".join(f"{name} {value:.1e}" for name, value in same["largest_difference"].items())
        lines.append(
            f"| `{row['model']}` | {row['layers']} x {row['width']} | {', '.join(map(str, row['entries']))} "
            f"| {same['tokens']:,} tokens, logits up to {same['largest_logit']:.1f}: {worst} |"
        )
    lines += [
        "",
        "Other work ran on the machine, so seconds of the thread stand beside those of the clock.",
        "",
        "| model | position | ms a token | of the thread (quartiles) | against the first, in turns | state, bytes "
        "| keys and values, bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["models"]:
        for at in row["decode"]:
            spread = " .. ".join(f"{1e3 * value:.3f}" for value in at["own_quartiles"])
            lines.append(
                f"| `{row['model']}` | {at['position']:,} | {1e3 * at['seconds']:.3f} "
                f"| {1e3 * at['own_seconds']:.3f} ({spread}) | {at['against_first']:.3f} "
                f"| {at['state_bytes']:,} | {at['key_value_bytes']:,} |"
            )
        again = row["convolution"]
        times = again["own_seconds"] / row["decode"][-1]["own_seconds"]
        lines.append(
            f"| `{row['model']}`, convolution | {again['position']:,} | {1e3 * again['seconds']:.0f} "
            f"| {1e3 * again['own_seconds']:.0f}, {times:.0f} x | | | |"
        )
    lines += ["", "| model | prompt | seconds | most above the model, MiB |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{row['model']}` | {read['tokens']:,} | {read['seconds']:.1f} | {read['mib']:.0f} |"
        for row in found["models"]
        for read in row["prefill"]
    ]
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*lines, "", f"Command: `{found['command']}`", "", f"Machine: {told}", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.hyena_decode", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="of the comparison (2000)")
    parser.add_argument("--positions", type=int, nargs="+", default=[1 << 10, 1 << 16])
    parser.add_argument("--convolve", type=int, default=1 << 15, help="tokens that are convolved (32768)")
    parser.add_argument("--convolutions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=50, help="tokens of a round (50)")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1 << 16, 1 << 20])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--read", type=int, help="read a prompt of so many tokens, and print what it takes")
    given = parser.parse_args(arguments)
    if given.read is not None:
        print(json.dumps(prefill(given.models[0], given.read, given.threads)))
        return 0
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {"models": [study(path, given) for path in given.models]}
    found["machine"] = machine("cpu") | {"threads": given.threads}
    found["command"] = (
        f"python -m tests.bench.hyena_decode {' '.join(path.name for path in given.models)} --out docs/results"
    )
    if given.out is None:
        print(page(found))
        return 0
    (given.out / "hyena-decode.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "hyena-decode.md").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
