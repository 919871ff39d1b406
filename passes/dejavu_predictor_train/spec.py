"""`dejavu-predictor-train`: what it takes, and what training predictors costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rewright.formats.dtypes import BITS, nbytes
from rewright.formats.text_config import positions_of
from rewright.passes.chunks import rows_scored
from rewright.passes.dejavu_predictor_train.values import Buckets, Rank, Targets
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.sites import Shape, Target, settle, shape_of
from rewright.passes.spec import Estimate, Layout, Opt, Spec
from rewright.passes.values import PredictorFolder

# Energy, or divergence, that a run keeps where neither budget, divergence nor recall is asked for.
RECALL = 0.99
# Of the tokens a quarter settles thresholds, and this many at most; an eighth on top of all is held out.
SETTLING, HELD_OUT = 16384, 0.125
# Tokens whose gradients tell how much an error at a site matters.
SENSED = 8192
# Ranks that `auto` tries.
RANKS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Steps that a neuron's threshold can take, and budgets that the attachment has thresholds for.
QUANTILES, LEVELS = 256, 8
# Settling tokens of each layer that are kept to the end, to see what several rows read together.
SAMPLED = 512
# Neurons on which ranks are compared, and how often a price is halved.
COMPARED, HALVINGS = 1024, 60
# What sorting a score and following its curve takes, and a step of a curve at a price, in the time of so many
# operations of a product; `python -m tests.bench.dejavu_dry` holds what follows against a run.
SORTED, PRICED = 10000, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class DejavuOptions:
    """The options of `dejavu-predictor-train`."""

    calibration_text: Annotated[
        tuple[Path, ...], Opt("text to learn from, .txt or .jsonl (repeatable)", metavar="FILE")
    ] = ()
    tokens: Annotated[int, Opt("tokens of it that are used", min=256, max=1 << 26)] = 65536
    sequence_length: Annotated[int, Opt("tokens of a sequence", min=8, max=1 << 20)] = 256
    method: Annotated[
        Literal["svd", "rrr", "bce"],
        Opt("`rrr`: reduced-rank regression; `svd`: whitened, as SVDP; `bce`: learned from there, as Deja Vu"),
    ] = "rrr"
    input: Annotated[
        Literal["post_norm", "block_in"], Opt("what a predictor reads: the MLP's own input, or that of its layer")
    ] = "post_norm"
    rank: Annotated[Rank, Opt("of each predictor, or `auto`: the fewest bytes a token", metavar="auto|N")] = Rank(None)
    budget: Annotated[float | None, Opt("share of the targeted rows that a token reads", min=0.001, max=1)] = None
    max_kl: Annotated[float | None, Opt("divergence from the dense model, nats a token", min=1e-6, max=10)] = None
    recall: Annotated[
        float | None,
        Opt(f"share kept of what dropping all would cost; {RECALL:g} unless another is asked for", min=0.01, max=1),
    ] = None
    cost: Annotated[
        Literal["divergence", "energy"],
        Opt("of what is dropped: in nats, by the Fisher information, or energy in the residual stream"),
    ] = "divergence"
    allocation: Annotated[Literal["global", "layer"], Opt("one price for all layers, or the same share in each")] = (
        "global"
    )
    batch_buckets: Annotated[Buckets, Opt("numbers of rows that thresholds are settled for", metavar="N,N,...")] = (
        Buckets((1, 2, 4, 8, 16))
    )
    predictor_dtype: Annotated[Literal["int8", "bf16"], Opt("of the predictors; int8 has a scale for each row")] = (
        "int8"
    )
    predictors: Annotated[
        PredictorFolder | None,
        Opt("settle thresholds for predictors of Deja Vu, PowerInfer or SVDP, a file a layer", metavar="FOLDER"),
    ] = None
    targets: Annotated[
        Targets,
        Opt(
            "`mlp` neurons, `heads`, `inputs` of matrices; by default neurons that can be off, else inputs",
            metavar="auto|mlp,heads,inputs",
        ),
    ] = Targets(())

    def __post_init__(self) -> None:
        if not self.calibration_text:
            raise UsageError("there is no text to learn from", hint="give `--calibration-text FILE`")
        asked = [name for name in ("budget", "max_kl", "recall") if getattr(self, name) is not None]
        if len(asked) > 1:
            flags = " and ".join(f"`--{name.replace('_', '-')}`" for name in asked)
            raise UsageError(f"{flags} ask for one thing in two ways", hint="give one of them")
        if self.predictors is not None and (self.rank.count is not None or self.method == "bce"):
            word = "--method bce" if self.method == "bce" else "--rank"
            raise UsageError(f"`{word}` is of predictors that are fitted, and `--predictors` are taken as they are")
        if self.max_kl is not None and self.cost == "energy":
            raise UsageError("`--max-kl` counts in nats, `--cost energy` does not", hint="leave out `--cost`")

    @property
    def rows(self) -> tuple[int, int, int]:
        """Sequences that predictors are fitted on, that settle thresholds, and that are held out."""
        every = max(4, self.tokens // self.sequence_length)
        settling = max(1, min(every // 4, max(1, SETTLING // self.sequence_length)))
        return every - settling, settling, max(2, int(HELD_OUT * every))


def check(options: DejavuOptions, layout: Layout) -> Shape:
    """The model's shape. Refuses what headers tell."""
    shape = shape_of(layout.config)
    targets = settle(shape, options.targets.names)
    positions = positions_of(layout.config)
    if positions is not None and options.sequence_length > positions:
        raise UsageError(
            f"`--sequence-length {options.sequence_length}` is past the model's {positions} positions",
            hint=f"use `--sequence-length {positions}`",
        )
    if "mlp" not in targets and (options.rank.count is not None or options.method == "bce"):
        word = "--rank" if options.rank.count is not None else "--method bce"
        raise UsageError(f"`{word}` is of predictors of neurons, which `--targets {','.join(targets)}` leaves out")
    if options.predictors is not None:
        _check_predictors(options.predictors, targets, shape)
    if options.rank.count is not None and options.rank.count > shape.width:
        raise UsageError(
            f"`--rank {options.rank.count}` is more than the model is wide",
            hint=f"use `--rank {max(1, shape.width // 16)}`",
        )
    return shape


def _check_predictors(given: PredictorFolder, targets: tuple[Target, ...], shape: Shape) -> None:
    """Refuse predictors that nothing asks, and a folder that lacks a layer or has one too many."""
    if "mlp" not in targets:
        raise UsageError(f"`--predictors` are of neurons, which `--targets {','.join(targets)}` leaves out")
    found = given.files
    missing, idle = set(range(shape.layers)) - set(found), set(found) - set(range(shape.layers))
    if missing:
        raise InputError(f"`{given}` has no predictor of layer {min(missing)}")
    if idle:
        raise InputError(f"`{given}` has a predictor of layer {min(idle)}, and the model has {shape.layers} layers")


def rank_foretold(options: DejavuOptions, shape: Shape) -> int:
    """The rank asked for, or about what `auto` takes."""
    return options.rank.count or max(RANKS[0], shape.width // 8)


def predictor_bytes(options: DejavuOptions, shape: Shape, rank: int) -> int:
    """Bytes of a layer's predictor that a token reads."""
    numbers, rows = rank * (shape.width + shape.neurons), rank + shape.neurons
    return numbers * (1 if options.predictor_dtype == "int8" else 2) + 4 * rows * (
        2 if options.predictor_dtype == "int8" else 1
    )


def _estimate(options: DejavuOptions, layout: Layout) -> Estimate:
    shape = check(options, layout)
    targets = settle(shape, options.targets.names)
    fit, settling, held = (rows * options.sequence_length for rows in options.rows)
    tokens, width, neurons = fit + settling + held, shape.width, shape.neurons
    weights = (
        sum(shape.rows(site) * shape.columns(site) for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid"))
        * shape.layers
    )
    vocabulary = int(layout.config.get("vocab_size", 0))
    sensed = min(SENSED, fit) if options.cost == "divergence" else 0
    steps: list[dict[str, Any]] = []

    def step(name: str, flops: int, peak: int) -> None:
        steps.append({"step": name, "flops": flops, "bytes_moved": 0, "peak_bytes": peak})

    stored = sum(nbytes(*entry) for entry in layout.tensors.values())
    # weights in float32, and the file's pages that they were read from
    resident = 4 * (weights + width * vocabulary) + stored
    scored = rows_scored(options.sequence_length, vocabulary) * options.sequence_length
    if sensed:
        # a layer keeps what each of its operations was fed
        kept = shape.layers * (12 * width + 3 * neurons + shape.heads * options.sequence_length)
        peak = resident + 4 * scored * (5 * vocabulary + kept)
        step("gradients", 3 * 2 * sensed * (weights + width * vocabulary), peak)
    # through the layers once, up to a layer's last matrix twice more for what is counted of it
    step("walk", 2 * (2 * (fit + settling) + held) * weights, 4 * (tokens * width + 2 * weights // shape.layers))
    rank = rank_foretold(options, shape)
    made = 0
    if "mlp" in targets:
        moments = 2 * fit * (width + 1) ** 2
        solve = 30 * width**3 + 4 * neurons * width**2
        ordered = settling * neurons * (2 * rank + 2 * width + SORTED)
        tried = sum(rank <= max(RANKS[0], width // 2) for rank in RANKS) if options.rank.count is None else 0
        tried = 0 if options.predictors is not None else tried
        learned = 6 * fit * rank * (width + neurons) * 2 if options.method == "bce" else 0
        step(
            "predictors",
            math.ceil(shape.layers * (moments + solve + (1 + tried * min(1, COMPARED / neurons)) * ordered + learned)),
            8 * settling * min(neurons, 1024) * 6 + 4 * settling * width + 8 * 3 * width**2,
        )
        numbers = rank * (width + neurons)
        made += shape.layers * (numbers * (BITS["I8"] if options.predictor_dtype == "int8" else BITS["BF16"]) // 8)
        made += shape.layers * 4 * neurons * (1 + LEVELS)
    if "heads" in targets:
        made += shape.layers * 4 * shape.groups * (width + 1 + LEVELS)
    for site in shape.covered(targets)["inputs"]:
        made += shape.layers * 4 * (shape.columns(site) + LEVELS)
    priced = PRICED * shape.layers * neurons * QUANTILES * HALVINGS * (1 + LEVELS)
    if "mlp" in targets:
        step("prices", priced, 8 * shape.layers * neurons * QUANTILES * 4)
    looked = 2 * held * (weights + width * vocabulary) * (2 if options.max_kl is None else 6)
    # with every curve, and what is kept to see what rows read together
    settled = shape.layers * neurons * 4 * (2 * QUANTILES + SAMPLED) if "mlp" in targets else 0
    step("held-out text", looked, resident + settled + 4 * scored * 6 * vocabulary)
    flops = sum(one["flops"] for one in steps)
    return Estimate(
        layout=replace(layout),
        output_bytes=made + stored,
        peak_host_bytes=max(one["peak_bytes"] for one in steps),
        peak_device_bytes=0,
        flops=flops,
        bytes_moved=0,
        details={"steps": steps, "targets": list(targets), "attachment_bytes": made},
    )


DEJAVU = Spec(
    name="dejavu-predictor-train",
    summary="train predictors of contextual sparsity, and decode with what they leave",
    version=1,
    options=DejavuOptions,
    impl="rewright.passes.dejavu_predictor_train.run:run",
    wants=frozenset({"weights", "config", "tokenizer", "text"}),
    gives="attachment",
    grain="layer",
    attachment="dejavu",
    metrics=frozenset(
        {
            "density",
            "bytes_share",
            "predictor_share",
            "kl",
            "kl_foretold",
            "top1_agreement",
            "perplexity_ratio",
            "energy_recall",
        }
    ),
    paper="Deja Vu (arXiv:2310.17157)",
    estimate=_estimate,
)
