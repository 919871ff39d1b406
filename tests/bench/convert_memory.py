"""What `convert` holds at most beside what `--dry-run` foretells: `python -m tests.bench.convert_memory --out FOLDER`.

Random packed models of one layer, half of every group kept, are converted in every direction, each conversion in a
process of its own. What a process holds is counted as in `tests.bench.larger`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rewright.formats.compressed_tensors import Scheme
from rewright.formats.packing import quantization_config
from rewright.kernels.pack import pack
from tests.bench.harness import machine
from tests.bench.larger import foretold, watched

# hidden, FFN, vocabulary: matrices of less than a block to many, and a large tensor that is copied
SIZES = ((256, 512, 512), (1024, 2816, 512), (2048, 5632, 512), (2048, 5632, 32000), (4096, 14336, 512))
WAYS = (("pack-quantized", "bitmask-w4"), ("pack-quantized", "dense"))
WAYS += (("bitmask-w4", "pack-quantized"), ("bitmask-w4", "dense"))
GROUP = 128


def shapes(hidden: int, ffn: int) -> dict[str, tuple[int, int]]:
    """The matrices of a layer."""
    found = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (hidden, hidden))
    return {**found, "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}


def write_packed(folder: Path, hidden: int, ffn: int, vocabulary: int) -> Path:
    """A model of one layer in 4-bit codes, of which half of every group are not zero."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    schemes: dict[str, Scheme] = {}
    for name, (rows, columns) in shapes(hidden, ffn).items():
        module = f"model.layers.0.{name}"
        codes = torch.randint(1, 8, (rows, columns // GROUP, GROUP), dtype=torch.int8, generator=generator)
        codes[:, :, ::2] = 0
        tensors[f"{module}.weight_packed"] = pack(codes.view(rows, columns), 4)
        tensors[f"{module}.weight_scale"] = torch.full((rows, columns // GROUP), 0.01, dtype=torch.bfloat16)
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        schemes[module] = Scheme(4, GROUP)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(vocabulary, hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden, "num_hidden_layers": 1}
    stated["quantization_config"] = quantization_config(schemes, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
    return folder


def study(folder: Path, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Every direction at every size; MiB are those above an idle process."""
    idle = watched()["held_mib"]
    rows = []
    for hidden, ffn, vocabulary in sizes:
        packed = write_packed(folder / "pack-quantized", hidden, ffn, vocabulary)
        watched("convert", str(packed), str(folder / "bitmask-w4"), "--to", "bitmask-w4", "--threads", "1")
        for form, to in WAYS:
            words = ["convert", str(folder / form), str(folder / "out"), "--to", to, "--threads", "1"]
            said = foretold(*words)["peak_host_bytes"] / 2**20
            found = watched(*words)["held_mib"] - idle
            row = {"hidden": hidden, "ffn": ffn, "vocabulary": vocabulary, "from": form, "to": to}
            rows.append({**row, "foretold_mib": said, "mib": found})
            print(rows[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder / "out")
        for form in ("pack-quantized", "bitmask-w4"):
            shutil.rmtree(folder / form)
    return {"idle_mib": idle, "rows": rows}


def page(found: dict[str, Any]) -> str:
    lines = [
        "# What `convert` holds at most",
        "",
        "Random models of one layer, with half of every group of 128 codes kept. Memory is the process's peak above one"
        " that",
        f"made the same imports and did nothing ({found['idle_mib']:.0f} MiB); one thread.",
        "",
        "| hidden | FFN | vocabulary | from | to | foretold, MiB | measured, MiB | foretold against measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        size = f"| {row['hidden']} | {row['ffn']} | {row['vocabulary']} | `{row['from']}` | `{row['to']}` |"
        ratio = row["foretold_mib"] / row["mib"] - 1
        lines.append(f"{size} {row['foretold_mib']:.0f} | {row['mib']:.0f} | {100 * ratio:+.0f} % |")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join([*lines, "", f"Command: `{found['command']}`", "", f"Machine: {told}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        found = study(Path(name), SIZES)
    found["machine"] = machine("cpu") | {"threads": 1}
    found["command"] = "python -m tests.bench.convert_memory --out docs/results"
    (given.out / "convert-memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "convert-memory.md").write_text(page(found))


if __name__ == "__main__":
    main()
