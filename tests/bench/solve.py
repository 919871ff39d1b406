"""What the solve of `compress` takes on a CPU: `python -m tests.bench.solve [--out docs/results]`.

A random Llama of 6.4 M linear parameters (hidden 512, 2 layers), 16 x 256 tokens, one thread. Prints the CPU
seconds of the solves (Hessian factor, zeros, scales, sweep), and for each layer the share of its time that is
spent in Python and not in torch.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.compress.fit import Fitter
from rewright.passes.compress.plan import draw_up
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.statistics import gather
from rewright.passes.compress.units import units_of
from rewright.passes.context import Silent
from rewright.passes.loading import Assembly
from rewright.passes.spec import Layout
from rewright.passes.values import GroupSize
from rewright.passes.walk import Walk
from tests.bench.harness import machine


def random_llama(folder: Path) -> Path:
    """A Llama of 6.4 M linear parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def python_share(profile: cProfile.Profile) -> float:
    """The share of a profile's time that is not inside a built-in function, which torch's operations are."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # set in __init__, unknown to the stubs
    total = sum(row[2] for row in stats.values())
    inside = sum(row[2] for (file, _, _), row in stats.items() if file == "~")
    return 1 - inside / total


def measure(sparsity: float, group_size: int, full: bool) -> dict[str, Any]:
    """Solve every layer twice: once timed, once profiled. `full`: as the defaults have it, not by the sweep alone."""
    torch.set_num_threads(1)
    options = CompressOptions(
        group_size=GroupSize(group_size),
        sparsity=sparsity or None,
        calibration_text=(Path("-"),),
    )
    if not full:
        options = replace(options, target="own", mask="sweep", refine=0)
    layers: list[dict[str, float]] = []
    parameters = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(random_llama(Path(folder)))
        tensors = {name: (entry.dtype, entry.shape) for name, entry in source.entries.items()}
        plan = draw_up(options, Layout(tensors, source.config or {}))
        tokens = torch.randint(0, 512, (16, 256), generator=torch.Generator().manual_seed(0))
        fitter = Fitter(options, torch.bfloat16, Silent())
        walk = Walk(Assembly(source, torch.float32, torch.device("cpu")), tokens, dense_from=0 if full else None)
        for layer in walk:
            seconds, share = 0.0, cProfile.Profile()
            planned = {matrix.local: matrix for matrix in plan.of_layer(layer.index)}
            groups = [tuple(planned[path] for path in paths) for stage in layer.stages() for paths in stage]
            for shared in gather(layer, groups, dense=full, writers=plan.family.writers):
                weight = torch.cat([m.turned(layer.weight(m.local)).float() for m in shared.matrices])
                parameters += weight.numel()
                units = units_of(shared.matrices)
                weights = [weight[unit.rows] for unit in units]
                started = time.process_time()
                list(fitter.fit(shared, units, fitter.prune(shared, units, weights)))
                seconds += time.process_time() - started
                share.enable()
                list(fitter.fit(shared, units, fitter.prune(shared, units, weights)))
                share.disable()
            layers.append({"cpu_seconds": round(seconds, 3), "python_share": round(python_share(share), 3)})
    return {
        "linear_parameters": parameters,
        "sparsity": sparsity,
        "group_size": group_size,
        "how": "default" if full else "sweep alone",
        "threads": 1,
        "cpu_seconds": round(sum(layer["cpu_seconds"] for layer in layers), 3),
        "layers": layers,
    }


def page(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# What the solve of `compress` takes on a CPU",
        "",
        "A random Llama of 6.42 M linear parameters (hidden 512, 2 layers), 16 x 256 tokens, one thread: CPU seconds",
        "of all solves (`sweep alone`: factor, zeros, scales, sweep; `default`: target, ADMM and refinement too), and",
        "for each layer the share spent in Python and not in torch.",
        "",
        "| how | sparsity | group size | CPU seconds | Python's share, by layer |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        shares = ", ".join(f"{layer['python_share']:.0%}" for layer in one["layers"])
        lines.append(
            f"| {one['how']} | {one['sparsity']:g} | {one['group_size']} | {one['cpu_seconds']:.2f} | {shares} |"
        )
    facts = ", ".join(f"{name} {value}" for name, value in machine("cpu").items())
    return "\n".join(
        [*lines, "", "Command: `python -m tests.bench.solve --out docs/results`", "", f"Machine: {facts}", ""]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for solve.json and solve.md")
    given = parser.parse_args(argv)
    found = [measure(zeros, group, full) for full in (False, True) for zeros in (0.0, 0.5) for group in (128, 32)]
    if given.out:
        (given.out / "solve.json").write_text(json.dumps({"machine": machine("cpu"), "runs": found}, indent=1) + "\n")
        (given.out / "solve.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
