"""What `compress` would do to a checkpoint, decided from its headers alone. Standard library only."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rewright.formats import bitmask, packing
from rewright.formats.compressed_tensors import Scheme
from rewright.formats.dtypes import nbytes
from rewright.formats.layout import TensorSpec
from rewright.formats.packing import Record
from rewright.formats.text_config import positions_of
from rewright.passes.compress import cost, readers, records
from rewright.passes.compress.shapes import Counting
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.families import Family, family_of
from rewright.passes.spec import Estimate, Layout
from rewright.passes.values import CODE_BITS, UNQUANTISED

if TYPE_CHECKING:
    import torch

    from rewright.passes.compress.spec import CompressOptions

# What compute kernels of today's servers take; a size of this list is preferred to any other divisor.
SERVED_SIZES = (128, 64, 32)
WEIGHT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer's weight: (rows, columns) = (outputs, inputs); stored the other way where `transposed`.

    `name` is the tensor in the source, `written` what the result calls it. `bits` is 16 where it is only pruned;
    `sparsity` the share of its weights to set to zero. `expert` marks a matrix of a layer's experts: where one tensor
    has them all, `part` is its place along the first axis, and its names end in `[part]`. Some rows of a matrix are a
    matrix too, with the same names: `first` is where they begin, `whole` how many rows there are in all.
    """

    name: str
    written: str
    layer: int
    rows: int
    columns: int
    dtype: str
    group: int | None
    transposed: bool
    bits: int
    sparsity: float
    expert: bool = False
    part: int | None = None
    first: int = 0
    whole: int | None = None

    def at(self, part: int) -> Matrix:
        """The matrix that is one part of this tensor."""
        return replace(self, name=f"{self.name}[{part}]", written=f"{self.written}[{part}]", part=part)

    def cut(self, first: int, stop: int) -> Matrix:
        """Some of its rows."""
        return replace(self, first=first, rows=stop - first, whole=self.rows)

    @property
    def is_cut(self) -> bool:
        return self.whole is not None

    @property
    def height(self) -> int:
        """The rows of the whole matrix."""
        return self.rows if self.whole is None else self.whole

    @property
    def span(self) -> slice:
        """Its rows within the whole matrix."""
        return slice(self.first, self.first + self.rows)

    @property
    def tensor(self) -> str:
        """The stored tensor that the matrix is, or is a part of."""
        return self.name if self.part is None else self.name.removesuffix(f"[{self.part}]")

    @property
    def target(self) -> str:
        """The same in the result."""
        return self.written if self.part is None else self.written.removesuffix(f"[{self.part}]")

    @property
    def quantised(self) -> bool:
        return self.bits < UNQUANTISED

    @property
    def module(self) -> str:
        return self.written.removesuffix(".weight")

    @property
    def local(self) -> str:
        """The module's name within its decoder layer."""
        return self.module.split(f".{self.layer}.", 1)[1]

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """From the stored orientation to (rows, columns), or back."""
        return weight.t() if self.transposed else weight


@dataclass(frozen=True, slots=True)
class Plan:
    """The matrices to compress, and what becomes of every name.

    `names` maps a stored name to what the result calls it, None where another tensor serves for it. `skipped` lists
    modules that `--skip` left alone. `scales` is the safetensors dtype of all scales.
    """

    family: Family
    matrices: tuple[Matrix, ...]
    skipped: tuple[str, ...]
    names: Mapping[str, str | None]
    scales: str

    def of_layer(self, index: int) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix.layer == index)


def fit_group(columns: int, wanted: int | None) -> int | None:
    """The group size for a width: `wanted`, or what comes nearest and divides; None is one scale a row.

    A width that `wanted` does not divide takes the largest of 128, 64, 32 below it that does, else the divisor
    nearest in ratio between half and twice `wanted`.
    """
    if wanted is None or columns % wanted == 0:
        return wanted
    for size in SERVED_SIZES:
        if size < wanted and columns % size == 0:
            return size
    near = [d for d in range(math.ceil(wanted / 2), min(2 * wanted, columns) + 1) if columns % d == 0]
    return min(near, key=lambda d: (abs(math.log(d / wanted)), d), default=None)


def scheme_of(matrix: Matrix, options: CompressOptions) -> Record | None:
    """How a matrix's codes are packed; None where its weights are written out."""
    if not (options.packs and matrix.quantised):
        return None
    if options.format == bitmask.FORM:
        return records.record_of(matrix, options.pattern)
    return Scheme(bits=matrix.bits, group_size=matrix.group, symmetric=options.symmetric)


def schemes(plan: Plan, options: CompressOptions) -> dict[str, Record]:
    """The modules that are packed, and how."""
    found = {matrix.module: scheme_of(matrix, options) for matrix in plan.matrices}
    return {module: scheme for module, scheme in found.items() if scheme is not None}


def draw_up(options: CompressOptions, layout: Layout) -> Plan:
    """Decide every matrix. Raises InputError for what this pass cannot take, UsageError for what cannot fit."""
    family = family_of(layout.config)
    _refuse_quantised(layout)
    words = _Words(options)
    names = _names(family, layout, options)
    matrices: list[Matrix] = []
    skipped: list[str] = []
    for name, (dtype, shape) in layout.tensors.items():
        layer = family.matrix_of(name, layout.config)
        experts = family.experts_of(name)
        fused = experts == "all"
        if layer is None or len(shape) != (3 if fused else 2):
            continue
        written = names[name] or name
        module = written.removesuffix(".weight")
        if words.skips(module):
            skipped.append(module)
            continue
        if dtype not in WEIGHT_DTYPES:
            raise InputError(f"tensor `{name}` is {_spoken(dtype)}", hint="decode the model to 16 bits first")
        turned = family.turns(fused)
        rows, columns = shape[:-3:-1] if turned else shape[-2:]
        group = fit_group(columns, options.group_size.columns)
        bits, sparsity = words.bits(module), words.sparsity(module)
        matrix = Matrix(name, written, layer, rows, columns, dtype, group, turned, bits, sparsity, experts is not None)
        _check_pattern(matrix, options)
        matrices += [matrix.at(part) for part in range(shape[0])] if fused else [matrix]
    words.check()
    shared = fit_group(readers.shared_width(matrices), options.group_size.columns)
    matrices = [replace(matrix, group=shared) if matrix.expert else matrix for matrix in matrices]
    if options.packs:
        readers.refuse(family, layout.model_type, matrices, skipped, symmetric=options.symmetric)
    if not matrices:
        raise InputError("no matrix to compress", hint="check `--skip` and the checkpoint's tensor names")
    if options.format == bitmask.FORM:
        records.check(matrices, options.pattern)
    # 16 bits, as the model has them: float16 where all of it is
    scales = "F16" if all(matrix.dtype == "F16" for matrix in matrices) else "BF16"
    return Plan(family, tuple(matrices), tuple(skipped), names, scales)


class _Words:
    """What `--skip`, `--bits-for` and `--sparsity-for` say of a module; of several that match the last one counts."""

    def __init__(self, options: CompressOptions) -> None:
        self.options = options
        self._skip = {f"--skip {regex}": regex for regex in options.skip}
        self._bits = {f"--bits-for {one}": (re.compile(one.expression), one.bits) for one in options.bits_for}
        self._sparsity = {
            f"--sparsity-for {one}": (re.compile(one.expression), one.sparsity) for one in options.sparsity_for
        }
        self._idle = {*self._skip, *self._bits, *self._sparsity}

    def skips(self, module: str) -> bool:
        hits = {said for said, regex in self._skip.items() if regex.found_in(module)}
        self._idle -= hits
        return bool(hits)

    def bits(self, module: str) -> int:
        # an average is dealt out later; until then every matrix has the most that any could get
        found = int(self.options.bits.number) if self.options.bits.whole else CODE_BITS[-1]
        for said, (expression, bits) in self._bits.items():
            if expression.search(module):
                self._idle.discard(said)
                found = bits
        return found

    def sparsity(self, module: str) -> float:
        found = self.options.zeros
        for said, (expression, sparsity) in self._sparsity.items():
            if expression.search(module):
                self._idle.discard(said)
                found = sparsity
        return found

    def check(self) -> None:
        """Raise UsageError for words that matched nothing."""
        if self._idle:
            raise UsageError(
                f"`{min(self._idle)}` matches no matrix", hint="`rewright show` lists a checkpoint's tensors"
            )


def _spoken(dtype: str) -> str:
    return f"fp8 ({dtype})" if dtype.startswith("F8") else dtype


def _refuse_quantised(layout: Layout) -> None:
    scheme = layout.config.get("quantization_config")
    if isinstance(scheme, Mapping):
        method = scheme.get("quant_method", "unknown")
        raise InputError(
            f"the checkpoint is quantised already (`quant_method` {method})",
            hint="compress the original weights; each rounding of rounded weights costs quality",
        )


def _check_pattern(matrix: Matrix, options: CompressOptions) -> None:
    of = options.pattern.of
    if of is None or options.format == bitmask.FORM:
        return
    if matrix.columns % of:
        raise UsageError(
            f"`--pattern {options.pattern}` does not divide the {matrix.columns} columns of `{matrix.name}`",
            hint="choose a smaller M, or leave the matrix out with `--skip`",
        )


def _names(family: Family, layout: Layout, options: CompressOptions) -> dict[str, str | None]:
    """What the result calls each tensor.

    Packed modules are found by the names of a running model, so a packed result has them even where its source lacks
    the base prefix. A tied tensor is written once, under the embedding's name.
    """
    bare = not any(name.startswith(family.base) for name in layout.tensors)

    def spelled(name: str) -> str:
        return (
            family.spellings(name)[0] if bare and options.packs and options.quantises and name != family.head else name
        )

    names: dict[str, str | None] = {name: spelled(name) for name in layout.tensors}
    if family.head in names and family.tied(layout.config):
        embedding = family.spellings(family.embedding)[1 if bare else 0]
        names[family.head] = None if embedding in layout.tensors else spelled(embedding)
    return names


def specs(plan: Plan, options: CompressOptions, layout: Layout) -> tuple[TensorSpec, ...]:
    """The tensors of the result."""
    planned = {matrix.tensor: matrix for matrix in plan.matrices}
    found: list[TensorSpec] = []
    for name, (dtype, shape) in layout.tensors.items():
        written = plan.names[name]
        scheme = scheme_of(planned[name], options) if name in planned else None
        if scheme is not None:
            found += packing.specs(planned[name].module, shape, scheme, plan.scales)
        elif written is not None:
            found.append(TensorSpec(written, dtype, shape))
    return tuple(found)


def table(plan: Plan, options: CompressOptions) -> list[dict[str, Any]]:
    """One row for matrices that differ by their layer or expert alone, as `--dry-run` shows it.

    Matrices whose bits are to be dealt out have the average.
    """
    counts = Counter[tuple[str, int, int, int | float, int | str | None, float]]()
    for matrix in plan.matrices:
        name = matrix.written.replace(f".{matrix.layer}.", ".*.", 1)
        if matrix.expert:
            name = re.sub(r"(experts\.)\d+\.|\[\d+\]$", lambda found: f"{found[1]}*." if found[1] else "[*]", name)
        group = (matrix.group or "channel") if matrix.quantised else None
        bits = options.bits.number if _undecided(matrix, options) else matrix.bits
        counts[name, matrix.rows, matrix.columns, bits, group, matrix.sparsity] += 1
    keys = ("name", "rows", "columns", "bits", "group_size", "sparsity")
    return [{**dict(zip(keys, key, strict=True)), "layers": count} for key, count in counts.items()]


def _undecided(matrix: Matrix, options: CompressOptions) -> bool:
    """Whether a matrix's bits are dealt out under an average."""
    return not options.bits.whole and not any(re.search(one.expression, matrix.module) for one in options.bits_for)


def _averaged(plan: Plan, options: CompressOptions) -> Plan:
    """The plan with the next bits below the average asked for, or above it as long as the average allows."""
    asked = options.bits.number
    low = max(bits for bits in CODE_BITS if bits <= asked)
    high = min(bits for bits in CODE_BITS if bits >= asked)
    left = (asked - low) * sum(m.rows * m.columns for m in plan.matrices if _undecided(m, options))
    matrices = []
    for matrix in plan.matrices:
        if _undecided(matrix, options):
            more = (high - low) * matrix.rows * matrix.columns
            taken = more <= left
            left -= more if taken else 0
            matrix = replace(matrix, bits=high if taken else low)
        matrices.append(matrix)
    return replace(plan, matrices=tuple(matrices))


def estimate(options: CompressOptions, layout: Layout) -> Estimate:
    """What a run writes and takes. Where bits are dealt out by measurement, which has to wait, sizes are near."""
    plan = draw_up(options, layout)
    dealt = plan if options.bits.whole else _averaged(plan, options)
    tensors = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs(dealt, options, layout)}
    output = sum(nbytes(dtype, shape) for dtype, shape in tensors.values())
    moved = sum(nbytes(dtype, shape) for dtype, shape in layout.tensors.values()) + output
    texts = options.needs_text or bool(options.calibration_text)
    length = sequence_length(options, layout.config) if texts else 1
    count = Counting(options, dealt, layout, options.samples, held_out_samples(options.samples), length, moved)
    found = cost.parts(count)
    totals = cost.totals(found)
    config = dict(layout.config)
    packed = schemes(dealt, options)
    if packed:
        config["quantization_config"] = packing.quantization_config(packed, [])
    return Estimate(
        layout=Layout(tensors, config),
        output_bytes=output,
        peak_host_bytes=totals["peak_bytes"] + (count.hidden if texts else 0),
        peak_device_bytes=totals["peak_bytes"],
        flops=totals["flops"],
        bytes_moved=totals["bytes_moved"],
        details={
            "parts": [part.told() for part in found],
            "matrices": table(plan, options),
            "skipped": list(plan.skipped),
        },
    )


def sequence_length(options: CompressOptions, config: Mapping[str, Any]) -> int:
    """Tokens of a calibration sequence. Raises InputError past the model's positions."""
    limit = positions_of(config)
    if limit is None or limit < 1:
        return options.sequence_length or 2048
    if options.sequence_length is not None and options.sequence_length > limit:
        raise InputError(f"`--sequence-length {options.sequence_length}` is past the model's {limit} positions")
    return options.sequence_length or min(2048, limit)


def held_out_samples(samples: int) -> int:
    """Sequences beside the calibration's own on which errors are reported."""
    return max(1, min(16, samples // 8))
