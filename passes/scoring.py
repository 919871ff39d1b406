"""A model as a scorer of tokens: what evaluation, questions and generation stand on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.packing import MARKS
from rewright.formats.peft import read_adapter
from rewright.passes.context import Reporter, Silent
from rewright.passes.errors import InputError
from rewright.passes.machine import compute_dtype, find_device

if TYPE_CHECKING:
    import torch

    from rewright.passes.loading import Assembly
    from rewright.passes.models.prompted import Front
    from rewright.passes.world import World


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens the model reads; the last `scored` of them are targets, standing for `size` bytes of UTF-8."""

    tokens: list[int]
    scored: int
    size: int


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model ready to score: `model` maps token rows to logits, `ends` are the tokens that end a text.

    With an `assembly` the model's decoder layers are in memory one at a time, and `model` itself cannot be called.
    `prompt` stands in front of every window; the `positions` are those that it leaves.
    """

    model: Any
    tokenizer: Any
    rows: int
    positions: int | None
    ends: frozenset[int]
    device: torch.device
    assembly: Assembly | None = None
    prompt: Front | None = None

    def decode_sparsely(self, prefix: int) -> bool:
        """From now on read texts as if their tokens after the first `prefix` were decoded; whether predictors are
        there."""
        from rewright.passes.models.sparse import flow_of

        flow = flow_of(self.model)
        if flow is not None:
            flow.prefix = prefix
        return flow is not None


def open_scorer(
    path: str | Path,
    device: str,
    dtype: str,
    *,
    brief: bool = False,
    by_layer: bool = False,
    prompt: bool | Path = True,
    predictors: bool = True,
    world: World | None = None,
) -> Scorer:
    """Load a checkpoint for scoring; a quantised one runs on its codes. Raises InputError when it has no tokenizer.

    Of several processes of a `world` each has a model of its own, on a device of its own where there are as many.
    With `brief` the dtype `auto` makes a quantised model run in bfloat16 on a CPU too: in float32 what it has dense,
    its embeddings, would take twice what they take on disk, and no product there multiplies by 4-bit codes. With
    `by_layer` no layer is loaded before it is wanted, and quantised ones are decoded then. `prompt` says whether the
    one that is attached stands in front of everything, or names another; `predictors` whether those that are attached
    are used, which they are not layer by layer.
    """
    from rewright.passes.loading import Assembly, load, load_tokenizer, stored_dtype
    from rewright.passes.models.prompted import Prompted

    place, source = find_device(device, world), Checkpoint.open(path)
    if dtype == "auto" and brief and place.type == "cpu" and _quantised(source):
        dtype = "bf16"
    computed, assembly = compute_dtype(dtype, place, stored_dtype(source)), None
    if by_layer:
        assembly = Assembly(source, computed, place)
        model, tokenizer = assembly.model, load_tokenizer(source)
    else:
        model, tokenizer = load(source, computed, place, packed=True, predictors=predictors)
    if tokenizer is None:
        raise InputError(f"`{path}` has no tokenizer", hint="put the model's `tokenizer.json` beside its weights")
    head = model.get_output_embeddings()
    # a packed head has no weight without decoding it
    rows = getattr(head, "out_features", None) or head.weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learned = _learned(source, model, prompt)
    if learned is not None:
        positions = None if positions is None else positions - len(learned)
        if positions is not None and positions < 2:
            raise InputError(f"the prompt of {len(learned)} tokens leaves no position for text")
        if by_layer and learned.depth == "all":
            raise InputError(
                "keys and values in front of every layer cannot be used layer by layer",
                hint="leave out `--by-layer`, or the prompt with `--no-prompt`",
            )
        model = model if by_layer else Prompted(model, learned)
    return Scorer(model, tokenizer, rows, positions, _ends(source, tokenizer), place, assembly, learned)


def _learned(source: Checkpoint, model: Any, prompt: bool | Path) -> Front | None:
    """The prompt to put in front of everything. Raises InputError for one that the model cannot read."""
    from rewright.passes import soft_prompt
    from rewright.passes.models.prompted import Front

    if prompt is False:
        return None
    adapter = soft_prompt.attached(source) if prompt is True else read_adapter(prompt)
    if adapter is None:
        return None
    rows, width = model.get_input_embeddings().weight.shape
    wide = soft_prompt.width_of(adapter.depth, width, source.config or {})
    if adapter.width != wide or (adapter.base is not None and adapter.base.rows != rows):
        made = adapter.base.rows if adapter.base else "any number of"
        raise InputError(
            f"the prompt `{adapter.source.path}` is {adapter.width} wide, for {made} rows of embedding; "
            f"`{source.path}` takes {wide} and has {rows}",
            hint="leave it out with `--no-prompt`, or attach one that fits with `rewright prompt`",
        )
    return Front(soft_prompt.load(adapter), adapter.depth).to("cpu" if model.device.type == "meta" else model.device)


def _quantised(source: Checkpoint) -> bool:
    return any(name.endswith(tuple(MARKS.values())) for name in source.entries)


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
    return next(scored(scorer, [batch]))


def scored(
    scorer: Scorer, batches: Sequence[Sequence[Window]], reporter: Reporter | None = None
) -> Iterator[list[torch.Tensor]]:
    """`log_probabilities` of each batch; by layer, all batches go through the model together."""
    import torch

    if scorer.assembly is None:
        for batch in batches:
            with torch.inference_mode():
                logits = scorer.model(input_ids=padded(batch).to(scorer.device), use_cache=False).logits
                found = _before_targets(logits, batch)
            # past the `with`: what holds there must not hold for whoever asks
            yield found
        return
    from rewright.passes.walk import Walk

    tokens = padded([window for batch in batches for window in batch])
    walk = Walk(scorer.assembly, tokens, prompt=scorer.prompt)
    with (reporter or Silent()).progress("layers", len(scorer.assembly.layers)) as bar:
        for _ in walk:
            bar.advance(1)
    first = 0
    for batch in batches:
        logits = walk.logits("compressed", slice(first, first + len(batch)))
        yield _before_targets(logits[:, -tokens.shape[1] :], batch)
        first += len(batch)


def padded(batch: Sequence[Window]) -> torch.Tensor:
    """The windows' tokens, int64 (windows, longest)."""
    import torch

    tokens = torch.zeros(len(batch), max(len(window.tokens) for window in batch), dtype=torch.int64)
    for row, window in enumerate(batch):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
    return tokens


def _before_targets(logits: torch.Tensor, batch: Sequence[Window]) -> list[torch.Tensor]:
    import torch

    found = []
    for row, window in enumerate(batch):
        last = len(window.tokens) - 1
        found.append(torch.log_softmax(logits[row, last - window.scored : last].float(), dim=-1))
    return found


def targets(window: Window, device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(window.tokens[-window.scored :], device=device)
