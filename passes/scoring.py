"""A model as a scorer of tokens: what evaluation, questions and generation stand on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.context import compute_dtype, find_device
from rewright.passes.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens the model reads; the last `scored` of them are targets, standing for `size` bytes of UTF-8."""

    tokens: list[int]
    scored: int
    size: int


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model ready to score: `model` maps token rows to logits, `ends` are the tokens that end a text."""

    model: Any
    tokenizer: Any
    rows: int
    positions: int | None
    ends: frozenset[int]
    device: torch.device


def open_scorer(path: str | Path, device: str, dtype: str, *, brief: bool = False) -> Scorer:
    """Load a checkpoint for scoring; a quantised one runs on its codes. Raises InputError when it has no tokenizer.

    With `brief` the dtype `auto` makes a quantised model run in bfloat16 on a CPU too: in float32 what it has dense,
    its embeddings, would take twice what they take on disk, and no product there multiplies by 4-bit codes.
    """
    from rewright.passes.loading import load, stored_dtype

    place, source = find_device(device), Checkpoint.open(path)
    if dtype == "auto" and brief and place.type == "cpu" and _quantised(source):
        dtype = "bf16"
    model, tokenizer = load(source, compute_dtype(dtype, place, stored_dtype(source)), place, packed=True)
    if tokenizer is None:
        raise InputError(f"`{path}` has no tokenizer", hint="put the model's `tokenizer.json` beside its weights")
    head = model.get_output_embeddings()
    # a packed head has no weight without decoding it
    rows = getattr(head, "out_features", None) or head.weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Scorer(model, tokenizer, rows, positions, _ends(source, tokenizer), place)


def _quantised(source: Checkpoint) -> bool:
    return any(name.endswith(("weight_packed", "weight_mask")) for name in source.entries)


def _ends(source: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: by the config, the generation config and the tokenizer."""
    found = [tokenizer.eos_token_id, (source.config or {}).get("eos_token_id")]
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((source.root / "generation_config.json").read_bytes())
        found.append(said.get("eos_token_id") if isinstance(said, dict) else None)
    listed = [one for value in found for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in listed if isinstance(one, int))


def log_probabilities(scorer: Scorer, batch: Sequence[Window]) -> list[torch.Tensor]:
    """For each window the log-probabilities before each of its targets, float32 (scored, vocabulary).

    Padding stands to the right, where a causal model does not see it.
    """
    import torch

    width = max(len(window.tokens) for window in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, window in enumerate(batch):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
    with torch.inference_mode():
        logits = scorer.model(input_ids=tokens.to(scorer.device), use_cache=False).logits
        found = []
        for row, window in enumerate(batch):
            last = len(window.tokens) - 1
            found.append(torch.log_softmax(logits[row, last - window.scored : last].float(), dim=-1))
        return found


def targets(window: Window, device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(window.tokens[-window.scored :], device=device)
