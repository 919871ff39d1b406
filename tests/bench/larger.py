"""A checkpoint larger than what a run may hold: `python -m tests.bench.larger --out docs/results`.

A random Llama (hidden 2048, FFN 5632, bfloat16) of as many layers as make `--gib` is written shard by shard, then
compressed by the plain sweep, converted, verified and evaluated, each in a process of its own. What a process holds at
most is counted by the kernel and set beside one that has made the same imports and done nothing, and beside
what `--dry-run` foretold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.bench.harness import machine

DATA = Path(__file__).resolve().parent.parent / "data"
SEPARATOR, STORIES = "<|endoftext|>", 8
HIDDEN, FFN, HEADS, VOCABULARY = 2048, 5632, 16, 512
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
WEIGHTS = sum(rows * columns for rows, columns in MATRICES.values())
SWEEP = ["--target", "own", "--mask", "sweep", "--refine", "0", "--pattern", "64:128"]
CALIBRATION = ["--calibration-text", str(DATA / "tinystories.txt"), "--samples", "16", "--sequence-length", "256"]
# Runs the words behind it as `rewright` would, and says on stderr what the process held at most.
WATCHED = """
import sys
from rewright.cli.main import main
from rewright.passes import loading
from rewright.passes.machine import peak_resident
import scipy, transformers.models.llama.modeling_llama
import rewright.passes.compress.run, rewright.passes.convert.run, rewright.passes.evaluate
code = 0
if sys.argv[1:]:
    try:
        main()
    except SystemExit as end:
        code = end.code
print("held", peak_resident(), file=sys.stderr)
sys.exit(code)
"""


def write_model(folder: Path, gib: float) -> int:
    """A random Llama of at least so many GiB, one shard a layer; returns its number of layers."""
    layers = -(-int(gib * 2**30) // (2 * WEIGHTS))
    folder.mkdir(parents=True)
    for path in (DATA / "stories260K").iterdir():
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(path, folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    owner: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def put(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        owner.update(dict.fromkeys(tensors, name))

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": draw(*shape) for name, shape in MATRICES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        put(layer + 1, tensors)
    ends = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    put(layers + 1, {**ends, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    size = sum((folder / name).stat().st_size for name in set(owner.values()))
    index = {"metadata": {"total_size": size}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def watched(*words: str) -> dict[str, Any]:
    """Run a command line; seconds, MiB held at most, and what it printed. Raises RuntimeError when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED, *words], env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    said = done.stderr.splitlines()
    if done.returncode or not said:
        raise RuntimeError(f"rewright {' '.join(words)}: exit status {done.returncode}: {' / '.join(said[-4:])}")
    held = next(line for line in reversed(said) if line.startswith("held"))
    return {"seconds": seconds, "held_mib": int(held.split()[1]) / 2**20, "printed": done.stdout}


def foretold(*words: str) -> dict[str, Any]:
    """What `--dry-run` says of a pass: seconds, bytes on disk and bytes in memory."""
    stage = json.loads(watched(*words, "--dry-run", "--json")["printed"])["stages"][0]
    return {key: stage[key] for key in ("seconds_estimated", "output_bytes", "peak_host_bytes")}


def some_stories(folder: Path) -> Path:
    """The first of the held-out stories, enough for two batches of tokens: more take longer and no more memory."""
    text = (DATA / "tinystories_heldout.txt").read_text(encoding="utf-8")
    path = folder / "stories.txt"
    path.write_text(SEPARATOR.join(text.split(SEPARATOR)[:STORIES]), encoding="utf-8")
    return path


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


def study(folder: Path, gib: float) -> dict[str, Any]:
    """Every step on one checkpoint; MiB are those above an idle process."""
    source, packed, bitmask = folder / "source", folder / "packed", folder / "bitmask"
    layers = write_model(source, gib)
    idle = watched()["held_mib"]
    common = ["--threads", "1"]
    scored = ["--text", str(some_stories(folder)), "--by-layer", *common]
    steps = {
        "compress": ("compress", str(source), str(packed), *SWEEP, *CALIBRATION, *common),
        "convert": ("convert", str(packed), str(bitmask), "--to", "bitmask-w4", *common),
        "verify, source": ("verify", str(source)),
        "verify, packed": ("verify", str(packed)),
        "eval, source": ("eval", str(source), *scored),
        "eval, packed": ("eval", str(packed), *scored),
    }
    rows: dict[str, Any] = {}
    for name, words in steps.items():
        row = rows[name] = {}
        if words[0] in ("compress", "convert"):
            row["foretold"] = foretold(*words)
        found = watched(*words)
        row |= {"seconds": found["seconds"], "mib": found["held_mib"] - idle}
        if words[0] in ("compress", "convert"):
            row["output_bytes"] = size_of(Path(words[2]))
        print(name, row, file=sys.stderr, flush=True)
    return {"layers": layers, "bytes": size_of(source), "idle_mib": idle, "steps": rows}


def page(found: dict[str, Any]) -> str:
    lines = [
        "# A checkpoint larger than memory",
        "",
        f"A random Llama of {found['layers']} layers, hidden 2048, FFN 5632: {found['bytes'] / 2**30:.2f} GiB"
        " of bfloat16.",
        "Memory is the process's peak above one that made the same imports and did nothing"
        f" ({found['idle_mib']:.0f} MiB). In brackets what `--dry-run` foretold. One thread; compression by the plain",
        f"sweep at 4 bits and 64:128, calibrated on 16 x 256 tokens; evaluation on the first 256 tokens of {STORIES}"
        " stories.",
        "",
        "| step | peak memory, MiB | time, s | written, GB |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in found["steps"].items():
        said = row.get("foretold")
        memory, seconds = f"{row['mib']:.0f}", f"{row['seconds']:.0f}"
        written = f"{row['output_bytes'] / 1e9:.3f}" if "output_bytes" in row else "-"
        if said:
            memory += f" ({said['peak_host_bytes'] / 2**20:.0f})"
            seconds += f" ({said['seconds_estimated']:.0f})"
            written += f" ({said['output_bytes'] / 1e9:.3f})"
        lines.append(f"| {name} | {memory} | {seconds} | {written} |")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*lines, "", f"Command: `{found['command']}`", "", f"Machine: {told}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--scratch", type=Path, default=None, help="where twice as much disk is free")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.scratch) as name:
        found = study(Path(name), given.gib)
    found["machine"] = machine("cpu") | {"threads": 1}
    found["command"] = f"python -m tests.bench.larger --gib {given.gib:g} --out docs/results"
    (given.out / "larger.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "larger.md").write_text(page(found))


if __name__ == "__main__":
    main()
