"""A step of `prompt` beside one of PEFT's prompt tuning.

`python -m tests.bench.prompt_peft CHECKPOINT --out docs/results`, with a CHECKPOINT that `compress` wrote. Both sides
learn from the same windows in the same order, from the same start, by Adam at the same rate; PEFT on the model as plain
transformers loads it, which is expanded. Each side is a process of its own, alternated, one thread. Memory is growth
of the peak over what the process held before it loaded the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes import calibration
from rewright.passes.context import Context
from rewright.passes.loading import import_model, load, load_tokenizer, register
from rewright.passes.machine import peak_resident, prepare
from rewright.passes.models.prompted import Front
from rewright.passes.prompt import start
from rewright.passes.prompt.data import Data, gather
from rewright.passes.prompt.learn import CLIP, Learner
from rewright.passes.prompt.spec import PromptOptions
from rewright.passes.scoring import padded
from rewright.passes.soft_prompt import base_of
from rewright.passes.training import BETAS, EPSILON, shuffled
from tests.bench.harness import machine
from tests.passes import prompting

DATA = Path(__file__).resolve().parent.parent / "data"
SIDES = ("rewright", "peft")


def ours(context: Context, options: PromptOptions, source: Checkpoint, data: Data) -> dict[str, Any]:
    """The pass's own loop."""
    model, tokenizer = load(source, torch.float32, packed=True)
    base = base_of(source)
    begun = start.begin(context, options, base, source, model, tokenizer, data)
    learner = Learner(context, options, model, data, None)
    times: list[float] = []
    gradients = learner._gradients

    def timed(training: Any, step: int) -> Any:
        began = time.process_time()
        found = gradients(training, step)
        times.append(time.process_time() - began)
        return found

    learner._gradients = timed  # type: ignore[method-assign]  # to time a step apart from looks
    training = learner.train(begun, start.columns(begun, model, model.get_input_embeddings().weight))
    # the step itself, Adam's, is not in it on this side, and is nothing beside it
    return {"seconds": times, "perplexity": training.notes["looks"][-1][1]}


def peers(context: Context, options: PromptOptions, source: Checkpoint, data: Data) -> dict[str, Any]:
    """The same by PEFT."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).eval()
    base = base_of(source)
    table = model.get_input_embeddings().weight
    tokenizer = load_tokenizer(source)
    begun = start.begin(context, options, base, source, model, tokenizer, data)
    assert options.tokens is not None
    asked = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.tokens)
    tuned: Any = get_peft_model(model, asked).eval()
    weight = tuned.prompt_encoder["default"].embedding.weight
    weight.data.copy_(begun.tensor)
    rate = options.learning_rate * start.scale_of(table)
    adam = torch.optim.AdamW([weight], lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    rise = max(1, round(options.warmup * options.steps))
    times = []
    for step in range(options.steps):
        began = time.process_time()
        places = shuffled(len(data.train), options.batch_size, step, context.seed).tolist()
        windows = [data.train[place] for place in places]
        tokens = padded(windows)
        labels = torch.full_like(tokens, -100)
        for row, window in enumerate(windows):
            last = len(window.tokens)
            labels[row, last - window.scored : last] = tokens[row, last - window.scored : last]
        mask = torch.zeros_like(tokens)
        for row, window in enumerate(windows):
            mask[row, : len(window.tokens)] = 1
        loss = tuned(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], CLIP)
        adam.param_groups[0]["lr"] = rate * _share(step, rise, options.steps)
        adam.step()
        adam.zero_grad()
        times.append(time.process_time() - began)
    learner = Learner(context, options, model, data, None)
    return {"seconds": times, "perplexity": learner.perplexity(Front(weight.detach()))}


def _share(step: int, rise: int, steps: int) -> float:
    """The schedule of `passes/training.py`."""
    import math

    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def one(side: str, path: Path, options: PromptOptions) -> dict[str, Any]:
    """A side, in this process."""
    prepare(1)
    source = Checkpoint.open(path)
    with tempfile.TemporaryDirectory() as folder:
        context = prompting.context(Path(folder), path)
        import_model(source)
        if side == "peft":
            import peft  # noqa: F401  # not counted
        tokenizer = load_tokenizer(source)
        data = gather(context, options, tokenizer, base_of(source).rows)
        calibration.start_tokens(tokenizer)
        idle = peak_resident()
        work: Callable[..., dict[str, Any]] = ours if side == "rewright" else peers
        found = work(context, options, source, data)
    times = found["seconds"][1:]
    return {"step": median(times), "memory": peak_resident() - idle, "perplexity": found["perplexity"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, help="folder for prompt-peft.json")
    parser.add_argument("--side", choices=SIDES, help="this side alone, in this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=192)
    given = parser.parse_args(argv)
    options = PromptOptions(
        text=(DATA / "tinystories.txt",),
        tokens=given.tokens,
        steps=given.steps,
        batch_size=given.batch_size,
        sequence_length=given.sequence_length,
        learning_rate=0.1,
        loss="next-token",
    )
    if given.side:
        print(json.dumps(one(given.side, given.checkpoint, options)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    words = [sys.executable, "-m", "tests.bench.prompt_peft", str(given.checkpoint)]
    for flag in ("tokens", "steps", "batch_size", "sequence_length"):
        words += [f"--{flag.replace('_', '-')}", str(getattr(given, flag))]
    for _ in range(given.rounds):
        for side in SIDES:
            done = subprocess.run([*words, "--side", side], capture_output=True, text=True, check=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, runs[side][-1], file=sys.stderr, flush=True)
    found = {side: {key: median(run[key] for run in all_of) for key in all_of[0]} for side, all_of in runs.items()}
    ratios = {key: found["rewright"][key] / found["peft"][key] for key in found["peft"]}
    document = {
        "checkpoint": given.checkpoint.name,
        "asked": {key: getattr(given, key) for key in ("tokens", "steps", "batch_size", "sequence_length", "rounds")},
        **found,
        "ratios": ratios,
        "machine": machine("cpu"),
    }
    print(json.dumps(document, indent=1))
    if given.out is not None:
        (given.out / "prompt-peft.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
