"""`prompt`: what it takes, and what learning costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rewright.formats import packing
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dtypes import nbytes
from rewright.formats.packing import Packing
from rewright.formats.peft import Adapter, Heads, read_adapter
from rewright.formats.text_config import layers_of, positions_of, text_config
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.families import FAMILIES, family_of
from rewright.passes.prompt.units import UNIT_TOKENS
from rewright.passes.spec import Estimate, Layout, Opt, Spec
from rewright.passes.values import ModelPath, PromptStart

# Tokens of a prompt that no file settles.
TOKENS = 100
# Of the teacher's predictions those of so many tokens are kept.
TOP = 64
# How often the validation text is looked at in the course of a run at most, and how many windows of it.
LOOKS, VALIDATION = 20, 64
# What to do about a prompt of another model.
OTHERS = "add `--any-base` to take it all the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """The options of `prompt`."""

    text: Annotated[tuple[Path, ...], Opt("text to learn from, .txt or .jsonl (repeatable)", metavar="FILE")] = ()
    tokens: Annotated[
        int | None, Opt(f"tokens of the prompt; by default {TOKENS}, or as many as `--init` has", min=1, max=65536)
    ] = None
    depth: Annotated[
        Literal["input", "all"],
        Opt("`input`: embeddings before the first layer; `all`: keys and values in every layer, as prefix tuning"),
    ] = "input"
    steps: Annotated[int, Opt("steps of Adam; 0 attaches what the prompt begins as", min=0)] = 1000
    learning_rate: Annotated[float, Opt("at its peak, for embeddings of root mean square 1", min=0, max=1e6)] = 0.3
    batch_size: Annotated[int, Opt("windows of text a step", min=1)] = 8
    sequence_length: Annotated[int, Opt("tokens of text a window, the start token included", min=2)] = 256
    init: Annotated[
        PromptStart,
        Opt(
            "begin as `text` that is learned from, its `vocab` in no order, `random`, or a learned prompt",
            metavar="vocab|text|random|FILE",
        ),
    ] = PromptStart("text")
    init_text: Annotated[str | None, Opt("begin as this text, repeated to the prompt's length", metavar="TEXT")] = None
    loss: Annotated[
        Literal["auto", "next-token", "distill", "mix"],
        Opt(
            "`next-token` of the text, `distill` of what a teacher predicts, half of each; auto: distill with a teacher"
        ),
    ] = "auto"
    teacher: Annotated[
        ModelPath | None, Opt("the uncompressed model; in a chain by default the chain's source", metavar="MODEL")
    ] = None
    validation_text: Annotated[
        tuple[Path, ...], Opt("text to choose the best step on; by default documents of `--text`", metavar="FILE")
    ] = ()
    patience: Annotated[int, Opt("stop after so many looks at that text without gain; 0: never", min=0)] = 0
    warmup: Annotated[float, Opt("share of the steps in which the learning rate rises", min=0, max=1)] = 0.05
    any_base: Annotated[bool, Opt("take an `--init` that was learned on another model")] = False
    recompute: Annotated[
        Literal["auto", "on", "off"],
        Opt("compute a layer's activations again for its gradient; auto: where they are large", affects="speed"),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.steps and not self.text:
            raise UsageError("there is no text to learn from", hint="give `--text FILE`, or `--init FILE --steps 0`")
        if not self.steps and self.init.file is None and self.init_text is None:
            raise UsageError(
                "`--steps 0` attaches a prompt that is there",
                hint='give it as `--init FILE`, or words as `--init-text "..."`',
            )
        if self.init_text is not None and self.init.word != "text":
            raise UsageError("`--init-text` goes with `--init text`")
        if self.init_text == "":
            raise UsageError("`--init-text` is empty")
        if self.teacher is not None and self.loss == "next-token":
            raise UsageError("`--teacher` counts for nothing with `--loss next-token`", hint="add `--loss distill`")
        if not self.steps and (self.text or self.validation_text):
            raise UsageError("a text counts for nothing with `--steps 0`", hint="leave out the text, or `--steps`")
        if not self.steps and self.depth == "all":
            raise UsageError("`--depth` is that of the prompt with `--steps 0`", hint="leave it out")
        if self.steps and self.learning_rate == 0:
            raise UsageError("`--learning-rate 0` learns nothing", hint="use `--steps 0` to attach a prompt as it is")

    def settled(self, *, taught: bool) -> PromptOptions:
        """The same with the loss that `auto` stands for; `taught`: a chain's source can be the teacher."""
        if self.loss != "auto":
            return self
        return replace(self, loss="distill" if taught or self.teacher is not None else "next-token")

    @property
    def distills(self) -> bool:
        """Whether a teacher is asked."""
        return self.steps > 0 and self.loss in ("distill", "mix")


def pause(options: PromptOptions) -> int:
    """Steps from one look at the validation text to the next: looking takes about half of what learning takes at most.

    A window that is learned from takes three times what one takes that is looked at.
    """
    afforded = 3 * options.steps * options.batch_size // (2 * VALIDATION)
    return max(1, -(-options.steps // min(LOOKS, max(2, afforded))))


def table(layout: Layout) -> tuple[int, int]:
    """Rows and width of the token embedding. Raises InputError."""
    family = family_of(layout.config)
    for name in family.spellings(family.embedding):
        if name in layout.tensors:
            rows, width = layout.tensors[name][1]
            return rows, width
    raise InputError(f"tensor `{family.embedding}` is missing", hint="is a shard of the download absent?")


def tokens_of(options: PromptOptions) -> int:
    """Tokens of the prompt. Raises FormatError for an `--init` that is none, UsageError for one of another length."""
    if options.init.file is None:
        return options.tokens or TOKENS
    held = read_adapter(options.init.file).tokens
    if options.tokens not in (None, held):
        raise UsageError(
            f"`--init {options.init}` has {held} tokens, not {options.tokens}", hint="leave out `--tokens`"
        )
    return held


def slides(config: Mapping[str, Any]) -> bool:
    """Whether some layers see a window of what is before them, out of which a prompt would move."""
    text = text_config(config)
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return window is not None or any(kind != "full_attention" for kind in text.get("layer_types") or ())


def check(options: PromptOptions, layout: Layout) -> None:
    """Refuse what headers tell: a prompt and text past the positions, a start or a teacher of another model."""
    tokens, positions = tokens_of(options), positions_of(layout.config)
    if positions is not None and options.steps and tokens + options.sequence_length > positions:
        raise UsageError(
            f"{tokens} tokens of prompt and {options.sequence_length} of text are past the model's"
            f" {positions} positions",
            hint=f"use `--sequence-length {positions - tokens}`" if positions - tokens > 1 else "use fewer `--tokens`",
        )
    if positions is not None and tokens >= positions:
        raise UsageError(f"{tokens} tokens of prompt leave no room for text in the model's {positions} positions")
    if options.depth == "all" and slides(layout.config):
        raise UsageError("`--depth all` does not work with sliding windows of attention", hint="use `--depth input`")
    if options.init.file is not None:
        _check_init(options, read_adapter(options.init.file), layout)
    if options.teacher is not None:
        rows, theirs = table(layout)[0], table(Layout.of(Checkpoint.open(options.teacher.checkpoint)))[0]
        if rows != theirs:
            raise InputError(f"the teacher `{options.teacher}` has another vocabulary: {theirs} rows, not {rows}")


def _check_init(options: PromptOptions, adapter: Adapter, layout: Layout) -> None:
    """Refuse a learned prompt that the model cannot read, or that its header says is another model's."""
    rows, width = table(layout)
    takes = Heads.of(layout.config).numbers if adapter.depth == "all" else width
    if adapter.width != takes:
        raise InputError(f"the prompt `{options.init}` is {adapter.width} wide, and the model takes {takes}")
    if adapter.depth == "all" and slides(layout.config):
        raise InputError(
            f"`{options.init}` has keys and values for every layer, which do not work with sliding windows of attention"
        )
    if adapter.depth == "all" and options.depth == "input" and options.steps:
        raise UsageError(f"`{options.init}` has keys and values for every layer", hint="use `--depth all`")
    if adapter.base is not None and adapter.base.rows != rows and not options.any_base:
        raise InputError(
            f"the prompt `{options.init}` was learned on another model: its base has {adapter.base.rows} rows of"
            f" embedding, and this one has {rows}",
            hint=OTHERS,
        )


def layer_weights(layout: Layout) -> int:
    """How many weights the decoder layers multiply by, whatever form they are stored in."""
    family, stated = family_of(layout.config), packing.parse(layout.config)
    return sum(
        _weights(name, shape, stated)
        for name, (_, shape) in layout.tensors.items()
        if family.layer_of(name) is not None
    )


def _weights(name: str, shape: tuple[int, ...], stated: Packing | None) -> int:
    module, _, leaf = name.rpartition(".")
    record = stated.of(module) if stated is not None else None
    if record is not None:
        bits = {"weight_packed": 32 / record.bits, "weight_mask": 8}.get(leaf, 0)
        return int(math.prod(shape) * bits)
    return math.prod(shape) if len(shape) > 1 and leaf == "weight" else 0


def _estimate(options: PromptOptions, layout: Layout) -> Estimate:
    # stages that are still to run are those of this chain, whose source is another model then
    options = options.settled(taught=any(not stage.get("metrics") for stage in layout.made))
    check(options, layout)
    tokens, (rows, width) = tokens_of(options), table(layout)
    numbers = Heads.of(layout.config).numbers if options.depth == "all" else width
    made = 2 * 4 * tokens * numbers
    layers = layers_of(layout.config)
    head, inner = rows * width, layer_weights(layout)
    length = options.sequence_length
    own = options.steps * options.batch_size * length
    seen = options.steps * options.batch_size * (tokens + length)
    # a product forward and one back, and of the head one more for its gradient; attention once and twice more back
    flops = 4 * (seen * inner + own * head) + 12 * seen * (tokens + length) * width * layers
    looked = (2 + options.steps // pause(options)) * VALIDATION * (tokens + length)
    looks = looked * (2 * (inner + head) + 4 * (tokens + length) * width * layers)
    parts = [
        {"step": "learn", "flops": flops, "bytes_moved": 0, "peak_bytes": 0},
        {"step": "look at the validation text", "flops": looks, "bytes_moved": 0, "peak_bytes": 0},
    ]
    flops += looks
    if options.distills:
        asked = own * (2 * (inner + head) + 4 * length * width * layers)
        parts.insert(0, {"step": "ask the teacher", "flops": asked, "bytes_moved": 0, "peak_bytes": 0})
        flops += asked
    if not options.steps:
        flops, parts = 0, []
    stored = sum(nbytes(*entry) for entry in layout.tensors.values())
    activations = UNIT_TOKENS * layers * 18 * width * 4
    logits = 3 * (1 << 24) * 4
    teacher = options.steps * options.batch_size * options.sequence_length * TOP * 6 if options.distills else 0
    return Estimate(
        layout=layout,
        output_bytes=made + teacher,
        peak_host_bytes=2 * stored + activations + logits if options.steps else made,
        peak_device_bytes=0,
        flops=flops,
        bytes_moved=0,
        details={
            "tokens": tokens,
            "prompt_bytes": 4 * tokens * numbers,
            "cache_entries_a_request": tokens,
            "parts": parts,
        },
    )


PROMPT = Spec(
    name="prompt",
    summary="learn a soft prompt that wins back what compression lost",
    version=1,
    options=PromptOptions,
    impl="rewright.passes.prompt.run:run",
    wants=frozenset({"weights", "config", "tokenizer"}),
    gives="attachment",
    attachment="prompt",
    grain="step",
    archs=frozenset(FAMILIES),
    metrics=frozenset(
        {"tokens", "steps", "best_step", "loss", "perplexity_before", "validation_perplexity", "validation_ratio"}
    ),
    paper="Compress, Then Prompt (arXiv:2305.11186)",
    spares=lambda options: frozenset({"tokenizer"} if not options.steps and options.init_text is None else ()),
    splits=lambda options: options.steps > 0,
    estimate=_estimate,
)
