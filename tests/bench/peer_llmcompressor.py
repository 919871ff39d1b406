"""One run of llm-compressor, in an environment of its own that knows nothing of this project.

`PYTHON tests/bench/peer_llmcompressor.py MODEL TOKENS OUT RECIPE` compresses MODEL with the calibration rows in
TOKENS (a safetensors file whose tensor `tokens` is int64, rows x length), writes OUT, and prints one line of JSON
last: the wall and CPU seconds from opening the model to the written checkpoint, the peak of resident memory, and
versions. RECIPE is JSON: `group`, and for SparseGPT before GPTQ also `sparsity` and `mask` ("0:0" or "N:M").
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "torch", "transformers", "compressed-tensors")


def memory(name: str) -> int:
    """A figure of this process in bytes: `VmHWM`, its peak, or `VmRSS`, what it holds now.

    `getrusage` would not do: a process inherits its parent's peak there, and a parent may be the larger of the two.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def warm(model: str) -> None:
    """Import what opening the model would import, so that no side pays for that within its time."""
    transformers: Any = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(model)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]
    import_module("torch").set_num_threads(1)


def timed(call: Callable[[], object], packages: tuple[str, ...]) -> dict[str, Any]:
    """What one call takes, and the versions it ran with."""
    before = memory("VmRSS")
    wall, own = time.perf_counter(), time.process_time()
    call()
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - own,
        "peak_bytes": memory("VmHWM"),
        "bytes_before": before,
        "versions": {name: version(name) for name in packages},
    }


def steps(recipe: dict[str, Any]) -> list[Any]:
    """The peer's modifiers, each with its own defaults beyond what the recipe asks for."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": recipe["group"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    found = [
        import_module("llmcompressor.modifiers.quantization").GPTQModifier(ignore=["lm_head"], config_groups=groups)
    ]
    if "sparsity" in recipe:
        prune = import_module("llmcompressor.modifiers.pruning").SparseGPTModifier
        layers = [r"re:.*layers\.\d+$"]
        found.insert(0, prune(sparsity=recipe["sparsity"], mask_structure=recipe["mask"], targets=layers))
    return found


def compress(model: str, tokens: str, out: str, recipe: dict[str, Any]) -> None:
    """Open, calibrate and compress, write. One row a batch is the peer's default, and no slower than sixteen."""
    transformers: Any = import_module("transformers")
    rows = import_module("safetensors.torch").load_file(tokens)["tokens"].tolist()
    import_module("llmcompressor").oneshot(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        processor=transformers.AutoTokenizer.from_pretrained(model),
        dataset=import_module("datasets").Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        ),
        recipe=steps(recipe),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        output_dir=out,
    )


def main(model: str, tokens: str, out: str, recipe: str) -> None:
    # what the steps import, before the clock starts
    import_module("datasets")
    steps({"group": 128, "sparsity": 0.5, "mask": "0:0"})
    warm(model)
    print(json.dumps(timed(lambda: compress(model, tokens, out, json.loads(recipe)), PACKAGES)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
