"""`compress` beside llm-compressor, each in an environment of its own.

`python -m tests.bench.peers MODEL... --peer 0.14=PYTHON --peer 0.12=PYTHON --out docs/results`

An environment is made by `python -m venv DIR` and `DIR/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1`, or
`llmcompressor==0.12.0.2`, the last release whose GPTQ keeps the zeros of SparseGPT. The models named, and a random
Llama of 6.42 M linear parameters, are compressed from the same calibration tokens; runs alternate, one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from rewright.passes import calibration
from rewright.passes.compress.plan import held_out_samples
from rewright.passes.evaluate import evaluate
from rewright.passes.inputs import Inputs
from rewright.passes.loading import load
from rewright.passes.values import Pattern
from tests.bench.harness import machine
from tests.bench.peers_page import page
from tests.bench.solve import random_llama

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
TEXT, HELD_OUT = DATA / "tinystories.txt", DATA / "tinystories_heldout.txt"

# heading -> the zeros asked for, as the peer and as `compress` call them
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W4": ({}, {}),
    "W4 + 50 %": ({"sparsity": 0.5, "mask": "0:0"}, {"sparsity": 0.5}),
    "W4 + 2:4": ({"sparsity": 0.5, "mask": "2:4"}, {"pattern": "2:4"}),
    "W4 + 16:32": ({"sparsity": 0.5, "mask": "16:32"}, {"pattern": "16:32"}),
}
OURS: dict[str, dict[str, Any]] = {
    "sweep": {"target": "own", "mask": "sweep", "refine": 0, "sequential": "layer"},
    "default": {},
}
# What is timed: the peer by GPTQ alone where it stands first, else with the zeros.
TIMED = {"0.14": "W4", "0.12": "W4 + 50 %", "sweep": "W4 + 50 %", "default": "W4 + 50 %"}


@dataclass(frozen=True, slots=True)
class Work:
    """A model, and how many rows of how many tokens it is calibrated on."""

    name: str
    model: Path
    samples: int
    length: int
    group: int


class RunError(Exception):
    """A side did not finish; the text is the last line it wrote."""


def draw(work: Work, folder: Path) -> tuple[Path, str]:
    """The rows that `compress` draws from the text with seed 0, in a file for the peers, and their digest."""
    model, tokenizer = load(work.model)
    drawn = calibration.draw(
        calibration.read_documents(TEXT, Inputs()),
        tokenizer,
        rows=model.get_input_embeddings().weight.shape[0],
        samples=work.samples,
        held_out=held_out_samples(work.samples),
        length=work.length,
        seed=0,
    )
    path = folder / f"{work.name}.safetensors"
    save_file({"tokens": drawn.tokens.contiguous()}, path)
    return path, hashlib.sha256(drawn.tokens.numpy().tobytes()).hexdigest()


def launch(command: Sequence[str], *, ours: bool) -> dict[str, Any]:
    """Run one side on one thread; returns what it says of itself. Raises RunError."""
    environment = {name: value for name, value in os.environ.items() if ours or not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RunError(lines[-1].strip() if lines else f"exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_peer(python: str, work: Work, tokens: Path, setting: str, out: Path) -> dict[str, Any]:
    """Compress with a peer. Raises RunError."""
    recipe = json.dumps({"group": work.group, **SETTINGS[setting][0]})
    # -P: the scripts beside this one must not stand in for modules of the peer's
    script = str(HERE / "peer_llmcompressor.py")
    return launch([python, "-P", script, str(work.model), str(tokens), str(out), recipe], ours=False)


def run_ours(how: dict[str, Any], work: Work, digest: str, setting: str, out: Path) -> dict[str, Any]:
    """Compress with `compress`; its rows must be the peers'. Raises RunError."""
    options = {
        "bits": 4,
        "group-size": work.group,
        "samples": work.samples,
        "sequence-length": work.length,
        "calibration-text": [str(TEXT)],
        **SETTINGS[setting][1],
        **how,
    }
    command = [sys.executable, "-m", "tests.bench.peer_rewright", str(work.model), str(out), json.dumps(options)]
    found = launch(command, ours=True)
    report = json.loads((out / "reports" / "compress.json").read_text())
    if report["calibration"]["digest"] != digest:
        raise RunError("calibrated on other tokens than the peers")
    return found


def zeros(checkpoint: Path, pattern: Pattern) -> dict[str, Any]:
    """The share of zeros in the matrices of the layers, over all and in the least, and blocks that break N:M."""
    model, _ = load(checkpoint)
    shares, sizes, broken, blocks = [], [], 0, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            empty = module.weight == 0
            shares.append(float(empty.float().mean()))
            sizes.append(empty.numel())
            if pattern.of is not None and pattern.keep is not None:
                full = (~empty).view(-1, pattern.of).sum(dim=1)
                broken += int((full > pattern.keep).sum())
                blocks += len(full)
    total = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    return {"share": total, "least": min(shares), "broken": broken, "blocks": blocks}


def verdict(setting: str, found: dict[str, Any]) -> str | None:
    """Why a checkpoint is not what its setting asks for; None where it is."""
    if found["broken"]:
        return f"{found['broken'] / found['blocks']:.1%} of the blocks hold too few zeros"
    asked = SETTINGS[setting][0].get("sparsity", 0.0)
    # a weight or two of a block may be missing
    if found["share"] < asked - 1e-3:
        return f"{found['share']:.1%} zeros, {found['least']:.1%} in one matrix"
    return None


def score(work: Work, setting: str, out: Path) -> dict[str, Any]:
    """Perplexity and divergence from the dense model on the held-out text, and whether the zeros are there."""
    scored = evaluate(out, text=HELD_OUT, compare=work.model, threads=1)
    counted = zeros(out, Pattern.parse(SETTINGS[setting][1].get("pattern", "unstructured")))
    return {
        "perplexity": scored["perplexity"],
        "kl": scored["kl"],
        "zeros": counted,
        "cannot": verdict(setting, counted),
    }


def study(work: Work, peers: dict[str, str], ours: dict[str, dict[str, Any]], runs: int) -> dict[str, Any]:
    """Times of alternated runs, then a score of every side at every setting."""
    times: dict[str, list[dict[str, Any]]] = {}
    scores: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, digest = draw(work, folder)

        def once(side: str, setting: str) -> tuple[dict[str, Any], Path]:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            if side in peers:
                return run_peer(peers[side], work, tokens, setting, out), out
            return run_ours(ours[side], work, digest, setting, out), out

        for turn in range(runs):
            for side in (*peers, *ours):
                found, out = once(side, TIMED[side])
                times.setdefault(side, []).append(found)
                if turn == 0:
                    scores.setdefault(side, {})[TIMED[side]] = score(work, TIMED[side], out)
                print(work.name, side, TIMED[side], f"{found['wall_seconds']:.2f} s", file=sys.stderr, flush=True)
        for side in (*peers, *ours):
            for setting in SETTINGS:
                if setting in scores.get(side, {}):
                    continue
                try:
                    _, out = once(side, setting)
                    scores.setdefault(side, {})[setting] = score(work, setting, out)
                except RunError as error:
                    scores.setdefault(side, {})[setting] = {"cannot": str(error)}
                print(work.name, side, setting, scores[side][setting], file=sys.stderr, flush=True)
        dense = evaluate(work.model, text=HELD_OUT, threads=1)["perplexity"]
    return {
        "samples": work.samples,
        "length": work.length,
        "group_size": work.group,
        "dense": dense,
        "times": {side: {"setting": TIMED[side], **summary(found)} for side, found in times.items()},
        "scores": scores,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the range of the wall time."""
    walls = [one["wall_seconds"] for one in found]
    return {
        "wall_seconds": median(walls),
        "wall_range": [min(walls), max(walls)],
        "cpu_seconds": median(one["cpu_seconds"] for one in found),
        "peak_bytes": median(one["peak_bytes"] for one in found),
        "bytes_before": median(one["bytes_before"] for one in found),
        "versions": found[0]["versions"],
        "runs": len(found),
    }


def works(models: Sequence[Path], folder: Path) -> Iterator[Work]:
    """The models named, and the random Llama with the tokenizer of a model that has as many tokens."""
    for model in models:
        yield Work(model.name, model, 128, 256, 32)
    random = random_llama(folder / "random")
    for file in (DATA / "stories260K").iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(file, random)
    yield Work("random Llama, 6.42 M linear parameters", random, 16, 256, 128)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="0.14|0.12=PYTHON", help="an environment")
    parser.add_argument("--out", type=Path, help="folder for peers.json and peers.md")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args(argv)
    peers = dict(word.split("=", 1) for word in given.peer)
    unknown = sorted(set(peers) - set(TIMED))
    if unknown:
        parser.error(f"`--peer {unknown[0]}=` is neither 0.14 nor 0.12")
    with tempfile.TemporaryDirectory() as folder:
        found = {work.name: study(work, peers, OURS, given.runs) for work in works(given.models, Path(folder))}
    named = " ".join([model.name for model in given.models] + [f"--peer {name}=PYTHON" for name in peers])
    results = {
        "command": f"python -m tests.bench.peers {named} --runs {given.runs} --out docs/results",
        "machine": {**machine("cpu"), "threads": 1},
        "models": found,
    }
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "peers.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "peers.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
