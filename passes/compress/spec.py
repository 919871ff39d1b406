"""`compress`: what it takes and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rewright.passes.compress.plan import estimate
from rewright.passes.errors import UsageError
from rewright.passes.models.families import FAMILIES
from rewright.passes.spec import Opt, Spec
from rewright.passes.values import GroupSize, Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """Options of `compress`; together they must ask for something to do."""

    bits: Annotated[Literal[2, 3, 4, 8, 16], Opt("bits a weight; 16 only prunes")] = 4
    group_size: Annotated[GroupSize, Opt("weights of a row that share a scale, or `channel`", metavar="N|channel")] = (
        GroupSize(128)
    )
    symmetric: Annotated[bool, Opt("codes around zero; asymmetric codes carry a zero point", negative="asymmetric")] = (
        True
    )
    sparsity: Annotated[float | None, Opt("share of weights set to zero", min=0, max=0.99)] = None
    pattern: Annotated[Pattern, Opt("where zeros may stand; N:M keeps N of every M", metavar="unstructured|N:M")] = (
        Pattern()
    )
    method: Annotated[
        Literal["gptq", "rtn", "magnitude", "wanda"],
        Opt("gptq: one sweep that prunes and quantises with error feedback; the others are baselines"),
    ] = "gptq"
    clip: Annotated[Literal["minmax", "mse"], Opt("how a group's scale is chosen")] = "mse"
    damp: Annotated[float, Opt("added to the Hessian's diagonal, as a share of its mean", min=0, max=1)] = 0.01
    block_size: Annotated[int, Opt("columns whose zeros are chosen together", min=8, max=4096)] = 32
    calibration_text: Annotated[
        tuple[Path, ...], Opt("text whose activations weigh the errors: .txt, .jsonl or `-` (repeatable)")
    ] = ()
    samples: Annotated[int, Opt("calibration sequences", min=1)] = 128
    sequence_length: Annotated[
        int | None, Opt("tokens a sequence; by default the model's context, at most 2048", min=2)
    ] = None
    skip: Annotated[tuple[str, ...], Opt("matrices left alone: a regular expression on names (repeatable)")] = ()
    format: Annotated[
        Literal["pack-quantized", "dense"],
        Opt("codes packed as compressed-tensors reads them, or weights decoded again, for any family"),
    ] = "pack-quantized"

    def __post_init__(self) -> None:
        fixed = self.pattern.sparsity
        if fixed is not None and self.sparsity is not None and abs(fixed - self.sparsity) > 1e-9:
            raise UsageError(
                f"`--pattern {self.pattern}` zeroes {fixed:g} of the weights, `--sparsity` says {self.sparsity:g}",
                hint="leave one of the two out",
            )
        if self.bits == 16 and not self.zeros:
            raise UsageError("`--bits 16` without `--sparsity` leaves nothing to do", hint="ask for either")
        if self.method in ("magnitude", "wanda") and not self.zeros:
            raise UsageError(f"`--method {self.method}` prunes, and no `--sparsity` is asked for")
        if self.needs_text and not self.calibration_text:
            raise UsageError(
                f"`--method {self.method}` needs `--calibration-text`",
                hint="name a text like the ones the model will read, or use `--method rtn`",
            )

    @property
    def zeros(self) -> float:
        """The share of weights to set to zero."""
        return self.pattern.sparsity or self.sparsity or 0.0

    @property
    def needs_text(self) -> bool:
        return self.method in ("gptq", "wanda")

    @property
    def packs(self) -> bool:
        """Whether matrices are written as packed codes."""
        return self.bits < 16 and self.format == "pack-quantized"


COMPRESS = Spec(
    name="compress",
    summary="prune and quantise a model in one calibrated sweep, layer by layer",
    version=1,
    options=CompressOptions,
    impl="rewright.passes.compress.run:run",
    wants=frozenset({"weights", "config", "tokenizer", "text"}),
    gives="weights",
    grain="layer",
    archs=frozenset(FAMILIES),
    metrics=frozenset({"matrices", "sparsity", "bits_per_weight", "error_calibration", "error_held_out"}),
    paper="Compress, Then Prompt (arXiv:2305.11186); GPTQ (arXiv:2210.17323); SparseGPT (arXiv:2301.00774)",
    estimate=estimate,
)
