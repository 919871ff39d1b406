"""What a learned prompt wins back, held against what it would have won without any compression."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rewright.formats import peft
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import Adapter
from rewright.formats.provenance import history
from rewright.formats.text_config import positions_of
from rewright.passes import registry, soft_prompt
from rewright.passes.context import Reporter
from rewright.passes.errors import InputError
from rewright.passes.evaluate import evaluate
from rewright.passes.inputs import Inputs
from rewright.passes.pipeline import execute
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import from_plain
from rewright.passes.survey import Run

ARMS = (
    "dense",
    "compressed",
    "compressed + prompt",
    "dense + a prompt learned on dense",
    "compressed + the prompt learned on dense",
)


def compare_arms(
    path: Path,
    dense: Path,
    texts: Sequence[Path],
    *,
    sequence_length: int,
    per_document: Literal["auto", "first", "all"] = "auto",
    options: RunOptions,
    reporter: Reporter,
) -> dict[str, Any]:
    """The five arms on each text: perplexity per scored token, all on the same targets, and what is won back.

    `recovery` is (compressed - with prompt) / (compressed - dense) in perplexity; None where compression lost nothing.
    The dense model's own prompt is learned by the next token, with the options that the attached one was learned with
    otherwise, into `<path>.dense-prompt`, once. Raises InputError where no prompt is attached, or its text is gone.
    """
    source = Checkpoint.open(path)
    adapter = soft_prompt.attached(source)
    if adapter is None:
        raise InputError(f"`{path}` has no prompt attached", hint="learn one with `rewright prompt`")
    _check_dense(path, adapter, dense, reporter)
    twin = _dense_prompt(path, source, dense, options, reporter)
    own = peft.found_in(twin)
    most = max(adapter.tokens, peft.read_adapter(own).tokens)
    positions = positions_of(source.config or {})
    length = sequence_length if positions is None else min(sequence_length, positions - most)
    given: dict[str, Any] = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
    given |= {"sequence_length": length, "per_document": per_document}
    runs: list[tuple[Path, bool | Path]] = [(dense, False), (path, False), (path, True), (dense, own), (path, own)]
    inputs = Inputs()
    found = []
    for text in texts:
        same = {"text": text, "reporter": reporter, "inputs": inputs, **given}
        scores = [evaluate(model, prompt=prompt, **same) for model, prompt in runs]
        perplexities = [one["perplexity"] for one in scores]
        lost = perplexities[1] - perplexities[0]
        found.append(
            {
                "text": scores[0]["text"],
                "scored_tokens": scores[0]["scored_tokens"],
                "perplexity": dict(zip(ARMS, perplexities, strict=True)),
                "recovery": (perplexities[1] - perplexities[2]) / lost if lost > 0 else None,
            }
        )
    return {"prompt_tokens": adapter.tokens, "sequence_length": length, "learned": adapter.learned, "texts": found}


def _check_dense(path: Path, adapter: Adapter, dense: Path, reporter: Reporter) -> None:
    """Raise InputError for a dense model that cannot be the one that was compressed; warn of one that may not be."""
    base, other = adapter.base, soft_prompt.base_of(Checkpoint.open(dense))
    if base is not None and (base.width, base.rows) != (other.width, other.rows):
        raise InputError(
            f"`{dense}` is not what `{path}` was made of: its embedding is {other.rows} x {other.width}, not"
            f" {base.rows} x {base.width}"
        )
    if base is not None and base.checksum != other.checksum:
        # of 16 bits rounded twice, or of another model
        reporter.warn(f"`{dense}` has another embedding than `{path}`: is it the model that was compressed?")


def _dense_prompt(path: Path, source: Checkpoint, dense: Path, options: RunOptions, reporter: Reporter) -> Path:
    """The dense model with a prompt of its own, learned as the attached one was; made where it is not there yet."""
    made = next((stage for stage in reversed(history(source.stamp)) if stage.get("pass") == "prompt"), None)
    if made is None:
        raise InputError(
            f"`{path}` does not say how its prompt was learned: no `prompt` among its stages",
            hint="learn it with `rewright prompt`",
        )
    spec = registry.get("prompt")
    asked = from_plain(spec.options, made["options"])
    if not asked.steps:
        raise InputError(
            f"the prompt of `{path}` was learned elsewhere", hint="compare the arms of the checkpoint it was learned on"
        )
    asked = replace(asked, loss="next-token", teacher=None)
    was, now = made.get("files") or {}, Inputs().digests_of(asked)
    for flag in now:
        if was.get(flag, now[flag]) != now[flag]:
            raise InputError(
                f"the contents of `--{flag}` changed since the prompt of `{path}` was learned",
                hint="put back what was there, or learn it anew",
            )
    place = Path(os.path.abspath(path))
    twin = place.with_name(f"{place.name}.dense-prompt")
    again = RunOptions(
        seed=made.get("seed", 0), dtype=made.get("dtype", "auto"), device=options.device, threads=options.threads
    )
    reporter.info(f"the dense model's own prompt: `{twin}`")
    execute(Run(dense, twin, (Stage(spec, asked),), replace(again, update=True)), reporter)
    return twin
