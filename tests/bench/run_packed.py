"""What quantised models take to run: `python -m tests.bench.run_packed MODEL... --out docs/results`.

A model is quantised by rounding, which takes seconds and costs no speed, and runs dense and packed through plain
transformers and packed as Rewright loads it. Speed is of one process that holds all of them and takes them in turn,
through one greedy loop, by the time that its one thread had a processor; memory is of a process for each, which has
made its imports and run a small model before its peak is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes import calibration
from rewright.passes.context import Silent
from rewright.passes.generate import greedy
from rewright.passes.inputs import Inputs
from rewright.passes.loading import Assembly, import_model, load_tokenizer
from rewright.passes.machine import give_back, peak_resident
from rewright.passes.models.running import weight_bytes
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.bench.harness import machine
from tests.bench.run_packed_page import page
from tests.passes.conftest import make as tiny

DATA = Path(__file__).resolve().parent.parent / "data"
TEXT = DATA / "tinystories_heldout.txt"
WINDOW = 256
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """A checkpoint, made with these options of `compress` (None: the dense one), and how it is run."""

    name: str
    made: dict[str, Any] | None
    ours: bool
    dtype: str

    @property
    def folder(self) -> str:
        return "-".join(str(value) for value in (self.made or {"bits": "dense"}).values()).replace(":", "of")


W4: dict[str, Any] = {"bits": 4}
WAYS = (
    Way("dense f32, transformers", None, False, "f32"),
    Way("dense bf16, transformers", None, False, "bf16"),
    Way("W4 bf16, transformers", W4, False, "bf16"),
    Way("W4 bf16, Rewright", W4, True, "bf16"),
    Way("bitmask W4 half empty bf16, Rewright", {"bits": 4, "format": "bitmask-w4", "pattern": "half"}, True, "bf16"),
    Way("W2 bf16, Rewright", {"bits": 2}, True, "bf16"),
    Way("W3 bf16, Rewright", {"bits": 3}, True, "bf16"),
    Way("W8 bf16, Rewright", {"bits": 8}, True, "bf16"),
    Way("W4 f32, Rewright", W4, True, "f32"),
)
DENSE = ("dense bf16, transformers", "dense f32, transformers")


def group_of(model: Path) -> int:
    """The largest of the usual groups that divides every width of a model's layers."""
    config = Checkpoint.open(model).config or {}
    widths = [int(config[key]) for key in ("hidden_size", "intermediate_size") if key in config]
    return next(size for size in (128, 64, 32, 16, 8) if all(width % size == 0 for width in widths))


def quantise(model: Path, way: Way, folder: Path) -> Path:
    """The checkpoint that a way runs, made once."""
    if way.made is None:
        return model
    target = folder / way.folder
    if not target.exists():
        group = group_of(model)
        options = {**way.made, "method": "rtn", "group-size": group}
        if options.get("pattern") == "half":
            options["pattern"] = f"{group // 2}:{group}"
        execute(Run(model, target, (make(1, "compress", options),), RunOptions(threads=1)), Silent())
    return target


def open_model(path: Path, way: Way) -> Any:
    if way.ours:
        # as `load` does, less the tokenizer
        assembly = Assembly(Checkpoint.open(path), DTYPES[way.dtype], torch.device("cpu"), packed=True)
        assembly.place()
        give_back()
        return assembly.model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[way.dtype], local_files_only=True).eval()


def windows(tokenizer: Any, source: Checkpoint, count: int) -> list[list[int]]:
    """Tokens of the held-out stories, in windows of one length."""
    rows = int((source.config or {})["vocab_size"])
    tokens: list[int] = []
    for text in calibration.read_documents(TEXT, Inputs()):
        tokens += calibration.encode(tokenizer, text, rows)
        if len(tokens) >= count * WINDOW:
            break
    return [tokens[at * WINDOW : (at + 1) * WINDOW] for at in range(count)]


def score(model: Any, found: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds, and the mean loss of all but the first token of each window."""
    started, loss = time.thread_time(), 0.0
    with torch.inference_mode():
        for window in found:
            row = torch.tensor([window])
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, row[0, 1:]))
    return time.thread_time() - started, loss / len(found)


def speed(model: Path, folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Medians of rounds in which each way has its turn, and of each round's ratios to the dense ways."""
    running = {way.name: open_model(quantise(model, way, folder), way) for way in WAYS}
    source = Checkpoint.open(model)
    texts = windows(load_tokenizer(source), source, given.windows)
    prompt = [token for window in texts for token in window][: given.prompt_tokens]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    losses: dict[str, float] = {}
    for number in range(given.rounds + 1):
        for name, one in running.items():
            prefill, decode, _ = greedy(one, prompt, given.new_tokens, time.thread_time)
            seconds, losses[name] = score(one, texts)
            if number:
                scored = len(texts) * WINDOW / seconds
                rates = {"prefill": len(prompt) / prefill, "decode": given.new_tokens / decode, "eval": scored}
                rounds[name].append(rates)
    found: dict[str, dict[str, Any]] = {}
    for name, taken in rounds.items():
        found[name] = {of: statistics.median(rates[of] for rates in taken) for of in ("prefill", "decode", "eval")}
        found[name] |= {"loss": losses[name], "weight_bytes": weight_bytes(running[name])}
        found[name]["to"] = {
            dense: {
                of: statistics.median(mine[of] / theirs[of] for mine, theirs in zip(taken, rounds[dense], strict=True))
                for of in ("prefill", "decode", "eval")
            }
            for dense in DENSE
        }
    return found


def memory(way: Way, path: Path, small: Path, given: argparse.Namespace) -> dict[str, int]:
    """In a process of its own: what opening the model, and then using it, add at most to what it holds.

    That is after it has made its imports, run a small model and read its text, the tokenizer kept.
    """
    source = Checkpoint.open(path)
    import_model(source)
    greedy(open_model(small, way), [1] * 64, 2)
    tokenizer = load_tokenizer(source)
    texts = windows(tokenizer, source, given.windows)
    give_back()
    with contextlib.suppress(OSError):
        # the peak starts anew
        Path("/proc/self/clear_refs").write_text("5")
    idle = peak_resident()
    model = open_model(path, way)
    opened = peak_resident()
    if given.use == "eval":
        score(model, texts)
    else:
        greedy(model, texts[0][: given.prompt_tokens], given.new_tokens)
    return {"opened": opened - idle, "peak": peak_resident() - idle}


def launch(model: Path, small: Path, way: Way, folder: Path, given: argparse.Namespace, use: str) -> dict[str, int]:
    paths = [quantise(model, way, folder), quantise(small, way, folder / "small-made")]
    words = ["--worker", way.name, "--use", use, "--windows", str(given.windows)]
    words += ["--prompt-tokens", str(given.prompt_tokens), "--new-tokens", str(given.new_tokens)]
    command = [sys.executable, "-m", "tests.bench.run_packed", *map(str, paths), *words]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


def study(model: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All ways of one model."""
    taken, small = speed(model, folder, given), tiny("llama", folder / "small")
    for way in WAYS:
        files = Checkpoint.open(quantise(model, way, folder)).files
        taken[way.name]["file_bytes"] = sum(path.stat().st_size for path in files)
        for use in ("generate", "eval"):
            taken[way.name].setdefault("memory", {})[use] = launch(model, small, way, folder, given, use)
    return {"group_size": group_of(model), "ways": taken}


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run_packed", description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that takes run_packed.json and run_packed.md")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--use", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    if given.worker:
        path, small = given.models
        print(json.dumps(memory(next(way for way in WAYS if way.name == given.worker), path, small, given)))
        return 0
    results = {
        "command": " ".join(["python -m tests.bench.run_packed", *(path.name for path in given.models)])
        + (f" --out {given.out}" if given.out else ""),
        "machine": machine("cpu"),
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "rounds": given.rounds,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            results["models"][model.name] = study(model, Path(folder) / model.name, given)
            if given.out:
                (given.out / "run_packed.json").write_text(json.dumps(results, indent=1) + "\n")
                (given.out / "run_packed.md").write_text(page(results))
    print(page(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
