"""What a dry run of `dejavu-predictor-train` foretells, and what comes: `python -m tests.bench.dejavu_dry --out DIR`.

A random model of OPT-125M's shape, 16,384 tokens, one thread: seconds and peak memory as `--dry-run` says, and those of
the run: the time of its processor, start and imports with it, and memory past that of an idle process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.bench.harness import machine

DATA = Path(__file__).resolve().parents[1] / "data"
PASS, TOKENS = "dejavu-predictor-train", 16384


def model(folder: Path) -> None:
    """Random weights in bfloat16, with the tokenizer of a small model."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768
    )
    OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "opt-stories" / name, folder)


def watched(words: list[str]) -> tuple[float, int]:
    """Seconds of a processor and bytes at most of a process."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the run failed: {told}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def idle() -> int:
    """Bytes of a process that has imported what the pass needs, and nothing else."""
    code = "import transformers, rewright.passes.dejavu_predictor_train.run\n"
    code += "from transformers import OPTForCausalLM\nprint(open('/proc/self/status').read())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("VmRSS"))


def main(argv: Sequence[str] | None = None) -> None:
    """Foretell, run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for dejavu-dry.json and dejavu-dry.md")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "opt"
        model(source)
        words = ["rewright", PASS, str(source), str(Path(scratch) / "out"), "--threads", "1", "--tokens", str(TOKENS)]
        words += ["--calibration-text", str(DATA / "tinystories.txt")]
        dry = subprocess.run([*words, "--dry-run", "--json"], capture_output=True, text=True, check=True).stdout
        stage: dict[str, Any] = json.loads(dry)["stages"][0]
        seconds, peak = watched(words)
    found = {
        "foretold": {"seconds": stage["seconds_estimated"], "bytes": stage["peak_host_bytes"]},
        "found": {"seconds": seconds, "bytes": peak - idle()},
        "machine": machine("cpu"),
    }
    (given.out / "dejavu-dry.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for key, scale, unit in (("seconds", 1.0, "s of a processor"), ("bytes", 2.0**20, "MiB past an idle process")):
        said, came = (found[kind][key] / scale for kind in ("foretold", "found"))
        rows.append(f"| {unit} | {said:.0f} | {came:.0f} | {100 * (said / came - 1):+.0f} % |")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    page = [
        "# What a dry run of dejavu-predictor-train foretells",
        "",
        f"A random model of OPT-125M's shape, {TOKENS:,} tokens, one thread.",
        "",
        "| | foretold | found | off by |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
        "Command: `python -m tests.bench.dejavu_dry --out docs/results`",
        "",
        f"Machine: {told}",
    ]
    (given.out / "dejavu-dry.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
