"""What several processes save, and what they send: `python -m tests.bench.processes MODEL --out docs/results`.

`compress` is run under torchrun with 1 and with 2 processes of one thread, in turn; both must make the same bytes. What
they sent is set beside what shapes foretell. A sum of a large tensor by itself gives the rate of the connection. Shapes
of large models are then reckoned for 1 to 64 processes from rates that the page names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rewright.passes.chunks import CHUNKS
from rewright.passes.compress import cost, traffic
from rewright.passes.compress.plan import draw_up, held_out_samples
from rewright.passes.compress.shapes import Counting
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.units import units_of
from rewright.passes.spec import Layout
from rewright.passes.world import World
from tests.bench.harness import machine

TEXT = Path(__file__).resolve().parent.parent / "data" / "tinystories.txt"
WORDS = ["--bits", "4", "--sparsity", "0.5", "--group-size", "32", "--threads", "1"]
# name -> hidden, FFN, layers, rows of keys, vocabulary
SHAPES = {
    "8B": (4096, 14336, 32, 1024, 128256),
    "70B": (8192, 28672, 80, 1024, 128256),
    "405B": (16384, 53248, 126, 1024, 128256),
}
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
# Of a large GPU, rounded down from what its maker says; nothing here was measured on one.
GPU = {"flops": 200e12, "bytes": 2e12, "link": 50e9}
# What is shared by runs of batches; the rest is shared by units of matrices.
BY_CHUNKS = ("forwards", "statistics")

_LINK = """
import os, time, torch
import torch.distributed as dist
from rewright.passes.sums import OrderedSum
from rewright.passes.world import Torchrun
world = Torchrun(int(os.environ["RANK"]), 2)
best = 0.0
for _ in range(5):
    own = OrderedSum(lambda: torch.ones(4096, 4096))
    own.term(world.rank)
    spans = [[(0, 1)], [(1, 1)]]
    before, started = world.sent, time.perf_counter()
    world.meet()
    world.add_up(own, spans)
    best = max(best, (world.sent - before) / (time.perf_counter() - started))
if world.leads:
    print(best)
world.close()
"""


def launch(size: int, words: Sequence[str]) -> tuple[float, str]:
    """Seconds of a command under torchrun, and its stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return time.monotonic() - started, done.stdout


def digest(folder: Path) -> str:
    """Of every weight file."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


def measured(model: Path, runs: int) -> dict[str, Any]:
    """Wall time with 1 and 2 processes, in turn, and what 2 sent."""
    times: dict[int, list[float]] = {1: [], 2: []}
    stages: dict[int, list[float]] = {1: [], 2: []}
    digests, sent = set(), 0
    for _ in range(runs):
        for size in times:
            with tempfile.TemporaryDirectory() as name:
                out = Path(name) / "out"
                command = ["-m", "rewright", "compress", str(model), str(out), *WORDS, "--calibration-text", str(TEXT)]
                seconds, _ = launch(size, command)
                made = json.loads((out / "rewright.json").read_text())["stages"][0]
                digests.add(digest(out))
            times[size].append(seconds)
            stages[size].append(made["seconds"])
            sent = made["bytes_sent"] if size > 1 else sent
            print(model.name, size, f"{seconds:.1f} s, the stage {made['seconds']:.1f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "link.py"
        script.write_text(_LINK)
        link = float(launch(2, [str(script)])[1])
    return {
        "model": model.name,
        "runs": runs,
        "wall_seconds": {str(size): median(found) for size, found in times.items()},
        "stage_seconds": {str(size): median(found) for size, found in stages.items()},
        "bytes_sent": sent,
        "equal_bytes": len(digests) == 1,
        "link_bytes_a_second": link,
    }


def llama(hidden: int, ffn: int, layers: int, keys: int, vocabulary: int) -> Layout:
    """The headers of a Llama of this shape."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = ("BF16", shape)
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = ("BF16", (vocabulary, hidden))
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    return Layout(tensors, config)


def reckoned(shape: tuple[int, int, int, int, int], processes: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of a default run at 4 bits and 50 % on 128 sequences of 2048 tokens, and bytes that a process sends."""
    options = CompressOptions(calibration_text=(TEXT,), samples=128, sequence_length=2048, sparsity=0.5)
    layout = llama(*shape)
    count = Counting(options, draw_up(options, layout), layout, 128, held_out_samples(128), 2048, 0)
    seconds = 0.0
    for part in cost.parts(count):
        # whoever has most takes longest
        share = math.ceil(CHUNKS / processes) / CHUNKS if part.step in BY_CHUNKS else _solving(count, processes)
        seconds += share * (part.flops / rates["flops"] + part.bytes_moved / rates["bytes"])
    sent = traffic.bytes_sent(count, processes) / processes
    return {"seconds": seconds, "sent": sent, "sending": sent / rates["link"]}


def _solving(count: Counting, processes: int) -> float:
    """The largest share of the solving that any process has, of one layer's."""
    world = World()
    world.size = processes
    most = whole = 0.0
    for group in count.layers[0]:
        costs = [unit.cost for unit in units_of(group.members)]
        most += max(sum(costs[place] for place in share) for share in world.shares(costs))
        whole += sum(costs)
    return most / whole


def page(found: dict[str, Any]) -> str:
    """What was measured, and apart from it what is reckoned."""
    ratios = {key: found[key]["1"] / found[key]["2"] for key in ("wall_seconds", "stage_seconds")}
    whole, stage, megabytes = found["wall_seconds"], found["stage_seconds"], found["bytes_sent"] / 1e6
    two = [f"{whole['2']:.1f} ({ratios['wall_seconds']:.2f}x)", f"{stage['2']:.1f} ({ratios['stage_seconds']:.2f}x)"]
    lines = [
        "# Several processes",
        "",
        "## Measured",
        "",
        f"`compress` of {found['model']} at W4 + 50 % with defaults, processes of one thread under torchrun on one",
        f"machine, medians of {found['runs']} runs in turn. The stage is the pass itself; the whole has launcher and",
        "imports too.",
        "",
        "| processes | whole, s | stage, s | sent, MB |",
        "| --- | --- | --- | --- |",
        f"| 1 | {whole['1']:.1f} | {stage['1']:.1f} | 0 |",
        f"| 2 | {two[0]} | {two[1]} | {megabytes:.1f} |",
        "",
        f"Equal bytes: {'yes' if found['equal_bytes'] else 'NO'}.",
        f"Shapes foretell {found['bytes_foretold'] / 1e6:.1f} MB.",
        f"A sum of 64 MiB by itself goes at {found['link_bytes_a_second'] / 1e9:.2f} GB/s a process.",
        "",
        "## Reckoned",
        "",
        "Llamas of these shapes, defaults at W4 + 50 %, 128 sequences of 2048 tokens. Operations and bytes are those",
        "of `--dry-run`; a step takes as long as the process with most of it, and sending is added. Reading the source",
        "and writing the result are not in it. Nothing in this table was measured on a GPU: it takes",
        f"{GPU['flops'] / 1e12:g} TFLOP/s, {GPU['bytes'] / 1e12:g} TB/s of memory and {GPU['link'] / 1e9:g} GB/s",
        "between processes.",
        "",
        "| GPUs | " + " | ".join(f"{name}: minutes | of them sending | GB sent each" for name in SHAPES) + " |",
        "| --- |" + " --- | --- | --- |" * len(SHAPES),
    ]
    for size in PROCESSES:
        cells = []
        for name in SHAPES:
            row = found["reckoned"][name][str(size)]
            minutes = (row["seconds"] + row["sending"]) / 60
            cells.append(f"{minutes:.1f} | {row['sending'] / 60:.1f} | {row['sent'] / 1e9:.0f}")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*lines, "", f"Command: `{found['command']}`", "", f"Machine: {told}", ""])


def foretold(model: Path) -> int:
    """Bytes that two processes send in the run that is measured, from shapes."""
    from rewright.formats.checkpoint import Checkpoint

    options = CompressOptions(calibration_text=(TEXT,), sparsity=0.5)
    source = Checkpoint.open(model)
    layout = Layout.of(source)
    held_out = held_out_samples(options.samples)
    length = int((source.config or {})["max_position_embeddings"])
    plan = draw_up(options, layout)
    return traffic.bytes_sent(Counting(options, plan, layout, options.samples, held_out, min(length, 2048), 0), 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    found = measured(given.model, given.runs)
    found["bytes_foretold"] = foretold(given.model)
    found["reckoned"] = {
        name: {str(size): reckoned(shape, size, GPU) for size in PROCESSES} for name, shape in SHAPES.items()
    }
    found["machine"] = machine("cpu") | {"threads": 1}
    found["command"] = f"python -m tests.bench.processes {given.model.name} --runs {given.runs} --out docs/results"
    (given.out / "processes.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "processes.md").write_text(page(found))


if __name__ == "__main__":
    main()
