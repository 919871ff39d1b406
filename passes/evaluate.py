"""Scores of a model: perplexity of a text, agreement with another model, multiple choice.

One protocol for every perplexity. A text is its documents, and they are cut into windows (`passes/windows.py`). Every
target is scored, and perplexity is the exponential of the mean negative log-likelihood of the scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rewright.passes import calibration
from rewright.passes.choices import answer
from rewright.passes.context import Reporter, Silent
from rewright.passes.errors import BoundError, InputError
from rewright.passes.inputs import Inputs
from rewright.passes.machine import prepare, usable_cpus
from rewright.passes.scoring import Scorer, Window, open_scorer, scored, targets
from rewright.passes.windows import windows
from rewright.passes.world import World

# Tokens of a window that are read densely where predictors choose of the others: the shortest of prompts.
DENSE_TOKENS = 16
# Logits that are held at once, in elements.
LOGITS = 1 << 25


def _batches(found: Sequence[Window], rows: int) -> Iterator[list[Window]]:
    """Windows of like length together, so that little is padded; the grouping depends on the windows alone."""
    batch: list[Window] = []
    for window in sorted(found, key=lambda window: len(window.tokens)):
        if batch and (len(batch) + 1) * len(window.tokens) * rows > LOGITS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@dataclass(slots=True)
class _Tally:
    loss: float = 0.0
    other_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    scored: int = 0
    size: int = 0


def _score(scorer: Scorer, other: Scorer | None, found: Sequence[Window], reporter: Reporter, world: World) -> _Tally:
    """Every window, each process some of the batches."""
    tally = _Tally(scored=sum(window.scored for window in found), size=sum(window.size for window in found))
    every = list(_batches(found, scorer.rows))
    own = world.share([len(batch) * len(batch[-1].tokens) for batch in every])
    scores = list(_window_scores(scorer, other, [every[place] for place in own], reporter))
    for loss, other_loss, divergence, agreed in (one for theirs in world.together(scores) for one in theirs):
        tally.loss -= loss
        tally.other_loss -= other_loss
        tally.divergence += divergence
        tally.agreed += agreed
    return tally


def _window_scores(
    scorer: Scorer, other: Scorer | None, batches: Sequence[Sequence[Window]], reporter: Reporter
) -> Iterator[tuple[float, float, float, int]]:
    """Of each window the log-likelihood under both models, the divergence, and the targets on which both agree."""
    import torch

    if not batches:
        return
    ours = scored(scorer, batches, reporter)
    others: Iterator[Sequence[torch.Tensor | None]] = ([None] * len(batch) for batch in batches)
    if other is not None:
        others = scored(other, batches, reporter)
    with reporter.progress("score", sum(map(len, batches))) as bar:
        for batch, own, theirs in zip(batches, ours, others, strict=True):
            for window, mine, dense in zip(batch, own, theirs, strict=True):
                target = targets(window, mine.device)[:, None]
                loss = float(mine.gather(1, target).sum(dtype=torch.float64))
                if dense is None:
                    yield loss, 0.0, 0.0, 0
                    continue
                dense = dense.to(mine.device)
                yield (
                    loss,
                    float(dense.gather(1, target).sum(dtype=torch.float64)),
                    float((dense.exp() * (dense - mine)).sum(dtype=torch.float64)),
                    int((dense.argmax(1) == mine.argmax(1)).sum()),
                )
            bar.advance(len(batch))


def _figures(loss: float, tally: _Tally) -> dict[str, Any]:
    if not math.isfinite(loss):
        raise BoundError(
            "the perplexity is not a number", hint="try `--dtype f32`, or `rewright verify` the checkpoint"
        )
    mean = loss / tally.scored
    bits = loss / math.log(2) / tally.size if tally.size else None
    return {"perplexity": math.exp(min(mean, 700.0)), "bits_per_byte": bits, "scored_tokens": tally.scored}


def _same_tokens(scorer: Scorer, other: Scorer, texts: Sequence[str], path: Path) -> None:
    """Two models can be compared on the same targets or not at all. Raises InputError."""
    if scorer.rows != other.rows or calibration.start_tokens(scorer.tokenizer) != calibration.start_tokens(
        other.tokenizer
    ):
        raise InputError(f"`{path}` has another vocabulary: {other.rows} rows, not {scorer.rows}")
    for text in texts:
        if calibration.encode(scorer.tokenizer, text, scorer.rows) != calibration.encode(
            other.tokenizer, text, other.rows
        ):
            raise InputError(f"`{path}` cuts the text into other tokens", hint="compare models of one tokenizer")


def evaluate(
    path: str | Path,
    *,
    text: Path | None = None,
    choices: Path | None = None,
    compare: Path | None = None,
    sequence_length: int = 256,
    per_document: Literal["auto", "first", "all"] = "auto",
    by_layer: bool = False,
    prompt: bool | Path = True,
    predictors: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    reporter: Reporter | None = None,
    inputs: Inputs | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Score a checkpoint on a text, on multiple-choice questions, or on both.

    The processes of `world` share a text's windows; layer by layer, and with questions, the first does all.

    `per_document` takes the first window of each document or all; `auto` takes the first where the text has several
    documents. With `compare` the other checkpoint scores the same targets: `kl` is the mean of KL(other || this) in
    nats, `top1_agreement` the share of targets before which both prefer the same token. `by_layer` holds one decoder
    layer at a time; each question goes through all of them again. A `prompt` that is attached stands in front of every
    window unless this is False, and is no target; a path names another for the checkpoint. With `predictors` that are
    attached every window is read as if its tokens were decoded, but for the first few. Raises InputError, BoundError.
    """
    reporter, inputs, world = reporter or Silent(), inputs or Inputs(), world or World()
    if world.size > 1 and (by_layer or choices is not None):
        same = partial(evaluate, path, text=text, choices=choices, compare=compare, sequence_length=sequence_length)
        same = partial(
            same,
            predictors=predictors,
            per_document=per_document,
            by_layer=by_layer,
            prompt=prompt,
            device=device,
            dtype=dtype,
        )
        return world.lead(partial(same, threads=threads, reporter=reporter, inputs=inputs))
    prepare(world.lead(lambda: threads or usable_cpus()))
    opened = partial(open_scorer, device=device, dtype=dtype, by_layer=by_layer, world=world, predictors=predictors)
    scorer = opened(path, prompt=prompt)
    other = opened(compare, prompt=prompt is not False) if compare is not None else None
    report: dict[str, Any] = {"prompt_tokens": 0 if scorer.prompt is None else len(scorer.prompt)}
    if other is not None:
        other.decode_sparsely(DENSE_TOKENS)
    report["decoded_sparsely"] = scorer.decode_sparsely(DENSE_TOKENS)
    if text is not None:
        report.update(_text(scorer, other, text, compare, sequence_length, per_document, reporter, inputs, world))
    if choices is not None:
        report["choices"] = answer(scorer, choices, inputs, reporter)
        if other is not None:
            report.setdefault("other", {})["choices"] = answer(other, choices, inputs, reporter)
    return report


def _text(
    scorer: Scorer,
    other: Scorer | None,
    text: Path,
    compare: Path | None,
    length: int,
    per_document: str,
    reporter: Reporter,
    inputs: Inputs,
    world: World,
) -> dict[str, Any]:
    texts = calibration.read_documents(text, inputs)
    if other is not None and compare is not None:
        _same_tokens(scorer, other, texts, compare)
    length = min(length, scorer.positions or length, (other.positions if other else None) or length)
    first_only = per_document == "first" or (per_document == "auto" and len(texts) > 1)
    found = list(windows(scorer.tokenizer, scorer.rows, texts, length, first_only))
    if not found:
        raise InputError(f"`{text}` has no token to score")
    tally = _score(scorer, other, found, reporter, world)
    start = calibration.start_tokens(scorer.tokenizer)
    report = {
        **_figures(tally.loss, tally),
        "documents": len(texts),
        "windows": len(found),
        "sequence_length": length,
        "stride": length - len(start),
        "start_token": start[0] if start else None,
        "per_document": "first" if first_only else "all",
        "text": {"name": text.name, "digest": inputs.digest(text)},
    }
    if other is not None:
        report["other"] = _figures(tally.other_loss, tally)
        report["perplexity_ratio"] = report["perplexity"] / report["other"]["perplexity"]
        report["kl"] = tally.divergence / tally.scored
        report["top1_agreement"] = tally.agreed / tally.scored
    return report
