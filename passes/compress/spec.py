"""`compress`: what it takes and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rewright.formats.bitmask import BITS as BITMASK_BITS
from rewright.formats.bitmask import FORM
from rewright.passes.compress.plan import estimate
from rewright.passes.compress.records import pattern_for
from rewright.passes.errors import UsageError
from rewright.passes.models.families import FAMILIES
from rewright.passes.spec import Opt, Spec
from rewright.passes.values import UNQUANTISED, Bits, BitsFor, GroupSize, Pattern, Regex, SparsityFor


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """Options of `compress`; together they must ask for something to do."""

    bits: Annotated[
        Bits, Opt("bits a weight: 2, 3, 4 or 8; 16 only prunes; an average such as 3.5 with `--budget measured`")
    ] = Bits(4)
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
        Opt("gptq: fitted to the calibration text, with error feedback; the others are baselines"),
    ] = "gptq"
    target: Annotated[
        Literal["dense", "own"],
        Opt("what a matrix is fitted to: the dense model's output, or its own on the inputs it now has"),
    ] = "dense"
    mask: Annotated[
        Literal["admm", "sweep", "keep"],
        Opt("how zeros are chosen: by ADMM, by the sweep as it goes, or keep those of the source"),
    ] = "admm"
    mask_block: Annotated[
        int | None,
        Opt("columns whose zeros are chosen together; by default 32 in a sweep, the whole matrix in ADMM", min=1),
    ] = None
    saliency: Annotated[
        Literal["quant-aware", "obs"],
        Opt("what a sweep takes a zero to cost: its error, or its error less that of rounding"),
    ] = "obs"
    clip: Annotated[
        Literal["hdiag", "mse", "minmax"],
        Opt("how a group's scale is chosen: least rounding error, weighed by the inputs or not, or the full range"),
    ] = "hdiag"
    order: Annotated[
        Literal["natural", "act"], Opt("columns as they stand, or those with the largest inputs first")
    ] = "natural"
    sequential: Annotated[
        Literal["module", "layer"],
        Opt("look at a matrix's inputs after the matrices before it were compressed, or once for a whole layer"),
    ] = "module"
    refine: Annotated[int, Opt("passes of coordinate descent over codes and scales", min=0, max=100)] = 3
    budget: Annotated[
        Literal["flat", "measured"],
        Opt("the same for every matrix, or as much as each can bear, by the KL of the logits that it costs"),
    ] = "flat"
    tune: Annotated[
        int, Opt("steps of Adam on each layer's weights before they are rounded; pays where zeros are", min=0)
    ] = 0
    polish: Annotated[int, Opt("steps of Adam on all scales and norms, by KL to the dense logits", min=0)] = 0
    damp: Annotated[float, Opt("added to the Hessian's diagonal, as a share of its mean", min=0, max=1)] = 0.01
    bits_for: Annotated[
        tuple[BitsFor, ...], Opt("other bits for some matrices: `REGEX=N` on names (repeatable)", metavar="REGEX=N")
    ] = ()
    sparsity_for: Annotated[
        tuple[SparsityFor, ...],
        Opt("another sparsity for some matrices: `REGEX=F` on names (repeatable)", metavar="REGEX=F"),
    ] = ()
    calibration_text: Annotated[
        tuple[Path, ...], Opt("text whose activations weigh the errors: .txt, .jsonl or `-` (repeatable)")
    ] = ()
    samples: Annotated[int, Opt("calibration sequences", min=1)] = 128
    sequence_length: Annotated[
        int | None, Opt("tokens a sequence; by default the model's context, at most 2048", min=2)
    ] = None
    skip: Annotated[
        tuple[Regex, ...], Opt("matrices left alone: a regular expression on names (repeatable)", metavar="REGEX")
    ] = ()
    format: Annotated[
        Literal["pack-quantized", "bitmask-w4", "dense"],
        Opt(
            "codes packed as compressed-tensors reads them, or without the zeros of an N:M pattern for our own readers;"
            " or weights decoded again, for any family"
        ),
    ] = "pack-quantized"

    def __post_init__(self) -> None:
        self._check_zeros()
        self._check_bits()
        if self.format == FORM:
            self._check_bitmask()
        if self.method != "gptq":
            self._check_baseline()
        if self.needs_text and not self.calibration_text:
            raise UsageError(
                f"`--method {self.method}` needs `--calibration-text`",
                hint="name a text like the ones the model will read, or use `--method rtn`",
            )

    def _check_zeros(self) -> None:
        fixed = self.pattern.sparsity
        if fixed is not None and self.sparsity is not None and abs(fixed - self.sparsity) > 1e-9:
            raise UsageError(
                f"`--pattern {self.pattern}` zeroes {fixed:g} of the weights, `--sparsity` says {self.sparsity:g}",
                hint="leave one of the two out",
            )
        if fixed is not None and self.sparsity_for:
            raise UsageError(
                f"`--pattern {self.pattern}` fixes the sparsity of every matrix, so `--sparsity-for` has no place",
                hint="leave one of the two out",
            )
        if self.mask == "keep" and (self.zeros or self.sparsity_for):
            raise UsageError("`--mask keep` takes the zeros of the source, so none can be asked for")
        if self.mask_block is not None and not self.prunes:
            raise UsageError("`--mask-block` says where new zeros are chosen, and none are asked for")
        if self.saliency != "obs" and not (self.mask == "sweep" and self.prunes):
            raise UsageError(
                f"`--saliency {self.saliency}` is of a sweep that chooses zeros, and this one does not",
                hint="add `--mask sweep` and `--sparsity`, or leave it out",
            )
        if self.order == "act" and self.prunes:
            raise UsageError(
                "`--order act` and pruning do not go together",
                hint="zeros chosen among the largest inputs first cost more than the order wins; leave one out",
            )

    def _check_bits(self) -> None:
        bits = self.bits
        if not bits.whole and self.budget != "measured":
            raise UsageError(
                f"`--bits {bits}` can only be an average: a matrix has 2, 3, 4, 8 or 16",
                hint="add `--budget measured`, which deals them out",
            )
        if bits.number == UNQUANTISED and not self.prunes and not self.bits_for and self.mask != "keep":
            raise UsageError("`--bits 16` without `--sparsity` leaves nothing to do", hint="ask for either")
        if self.deals_bits and bits.number == UNQUANTISED:
            raise UsageError(
                "`--budget measured` has nothing to deal out with `--bits 16` and no `--sparsity`",
                hint="it deals out zeros under `--sparsity`, or bits under an average",
            )

    def _check_bitmask(self) -> None:
        """The form has as many weights of every group of a matrix, each a symmetric code of 4 bits."""
        others = [f"--bits-for {one}" for one in self.bits_for if one.bits != BITMASK_BITS]
        if self.bits.number != BITMASK_BITS:
            others.append(f"--bits {self.bits}")
        if others:
            raise UsageError(
                f"`--format {FORM}` has codes of {BITMASK_BITS} bits, and `{others[0]}` asks for others",
                hint="use `--format pack-quantized`, or 4 bits",
            )
        if not self.symmetric:
            raise UsageError(
                f"`--format {FORM}` has no zero points, and `--asymmetric` asks for them",
                hint="use `--format pack-quantized`, or `--symmetric`",
            )
        if self.pattern.of is None:
            said = "`--mask keep`" if self.mask == "keep" else "an unstructured sparsity"
            asked = pattern_for(self.group_size.columns or 128, 1 - (self.sparsity or 0.5))
            raise UsageError(
                f"`--format {FORM}` keeps as many weights of every group, and {said} does not",
                hint=f"use `--pattern {asked}`, or `--format pack-quantized`",
            )
        if self.budget == "measured":
            raise UsageError(
                f"`--budget measured` deals out bits, and `--format {FORM}` has {BITMASK_BITS} for every matrix",
                hint="leave it out, or use `--format pack-quantized`",
            )

    def _check_baseline(self) -> None:
        if self.method in ("magnitude", "wanda") and not self.prunes:
            raise UsageError(f"`--method {self.method}` prunes, and no `--sparsity` is asked for")
        given = {
            "budget": self.budget != "flat",
            "tune": self.tune,
            "polish": self.polish,
            "mask-block": self.mask_block,
            "saliency": self.saliency != "obs",
            "order": self.order != "natural",
        }
        for said, other in given.items():
            if other:
                raise UsageError(f"`--{said}` goes with `--method gptq` alone, not with `{self.method}`")

    @property
    def zeros(self) -> float:
        """The share of weights to set to zero, where nothing else is said for a matrix."""
        return self.pattern.sparsity or self.sparsity or 0.0

    @property
    def splits(self) -> bool:
        """Whether several processes share the work: tuning, polishing and measured budgets want all rows in one."""
        return not (self.tune or self.polish or self.budget == "measured")

    @property
    def prunes(self) -> bool:
        """Whether new zeros are asked for anywhere."""
        return bool(self.zeros or any(one.sparsity for one in self.sparsity_for))

    @property
    def fits_dense(self) -> bool:
        """Whether matrices are fitted to the outputs of the dense model."""
        return self.method == "gptq" and self.target == "dense"

    @property
    def deals_zeros(self) -> bool:
        """Whether a measured budget deals out zeros."""
        return self.budget == "measured" and bool(self.sparsity) and self.pattern.of is None

    @property
    def deals_bits(self) -> bool:
        """Whether a measured budget deals out bits: an average, or the bits asked for where no zeros are dealt out."""
        return self.budget == "measured" and (not self.bits.whole or not self.deals_zeros)

    @property
    def needs_text(self) -> bool:
        return self.method in ("gptq", "wanda")

    @property
    def quantises(self) -> bool:
        """Whether any matrix gets codes."""
        return self.bits.number < UNQUANTISED or any(one.bits < UNQUANTISED for one in self.bits_for)

    @property
    def packs(self) -> bool:
        """Whether quantised matrices are written as packed codes."""
        return self.format != "dense"


COMPRESS = Spec(
    name="compress",
    summary="prune and quantise a model, each matrix fitted to what the dense model does",
    version=4,
    options=CompressOptions,
    impl="rewright.passes.compress.run:run",
    wants=frozenset({"weights", "config", "tokenizer", "text"}),
    gives="weights",
    grain="layer",
    archs=frozenset(FAMILIES),
    metrics=frozenset(
        {
            "matrices",
            "sparsity",
            "bits_per_weight",
            "error_calibration",
            "error_held_out",
            "layer_error_calibration",
            "layer_error_held_out",
        }
    ),
    paper="Compress, Then Prompt (arXiv:2305.11186); GPTQ (arXiv:2210.17323); SparseGPT (arXiv:2301.00774)",
    spares=lambda options: frozenset() if options.needs_text else frozenset({"tokenizer", "text"}),
    splits=lambda options: options.splits,
    estimate=estimate,
)
