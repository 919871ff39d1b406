"""What `compress` would do to a checkpoint, decided from its headers alone. Standard library only."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewright.formats.compressed_tensors import Scheme, packed_specs, quantization_config
from rewright.formats.draft import TensorSpec
from rewright.formats.dtypes import nbytes
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.families import Family, family_of
from rewright.passes.spec import Estimate, Layout

if TYPE_CHECKING:
    import torch

    from rewright.passes.compress.spec import CompressOptions

# What compute kernels of today's servers take; a size of this list is preferred to any other divisor.
SERVED_SIZES = (128, 64, 32)
WEIGHT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer's weight: (rows, columns) = (outputs, inputs); stored the other way where `transposed`.

    `name` is the tensor in the source, `written` what the result calls it.
    """

    name: str
    written: str
    layer: int
    rows: int
    columns: int
    dtype: str
    group: int | None
    transposed: bool

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


def scheme_of(matrix: Matrix, options: CompressOptions) -> Scheme:
    return Scheme(bits=options.bits, group_size=matrix.group, symmetric=options.symmetric)


def draw_up(options: CompressOptions, layout: Layout) -> Plan:
    """Decide every matrix. Raises InputError for what this pass cannot take, UsageError for what cannot fit."""
    family = family_of(layout.config)
    _refuse_quantised(layout)
    if options.packs and family.transposed:
        raise InputError(
            f"plain transformers cannot run a packed `{layout.model_type}`: its matrices are Conv1D",
            hint="use `--format dense`, which writes the compressed weights decoded",
        )
    skip = {expression: _pattern(expression) for expression in options.skip}
    idle = set(skip)
    names = _names(family, layout, options)
    matrices: list[Matrix] = []
    skipped: list[str] = []
    for name, (dtype, shape) in layout.tensors.items():
        layer = family.matrix_of(name, layout.config)
        if layer is None or len(shape) != 2:
            continue
        written = names[name] or name
        module = written.removesuffix(".weight")
        hits = {said for said, expression in skip.items() if expression.search(module)}
        idle -= hits
        if hits:
            skipped.append(module)
            continue
        if dtype not in WEIGHT_DTYPES:
            raise InputError(f"tensor `{name}` is {_spoken(dtype)}", hint="decode the model to 16 bits first")
        rows, columns = (shape[1], shape[0]) if family.transposed else shape
        group = fit_group(columns, options.group_size.columns)
        matrix = Matrix(name, written, layer, rows, columns, dtype, group, family.transposed)
        _check_pattern(matrix, options)
        matrices.append(matrix)
    if idle:
        raise UsageError(f"`--skip {min(idle)}` matches no matrix", hint="`rewright show` lists a checkpoint's tensors")
    if not matrices:
        raise InputError("no matrix to compress", hint="check `--skip` and the checkpoint's tensor names")
    # 16 bits, as the model has them: float16 where all of it is
    scales = "F16" if all(matrix.dtype == "F16" for matrix in matrices) else "BF16"
    return Plan(family, tuple(matrices), tuple(skipped), names, scales)


def _pattern(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UsageError(f"`--skip {expression}` is not a regular expression: {error}") from None


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
    if of is None:
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
        return family.spellings(name)[0] if bare and options.packs and name != family.head else name

    names: dict[str, str | None] = {name: spelled(name) for name in layout.tensors}
    if family.head in names and family.tied(layout.config):
        embedding = family.spellings(family.embedding)[1 if bare else 0]
        names[family.head] = None if embedding in layout.tensors else spelled(embedding)
    return names


def specs(plan: Plan, options: CompressOptions, layout: Layout) -> tuple[TensorSpec, ...]:
    """The tensors of the result."""
    planned = {matrix.name: matrix for matrix in plan.matrices} if options.packs else {}
    found: list[TensorSpec] = []
    for name, (dtype, shape) in layout.tensors.items():
        written = plan.names[name]
        if name in planned:
            matrix = planned[name]
            found += packed_specs(matrix.module, shape, scheme_of(matrix, options), plan.scales)
        elif written is not None:
            found.append(TensorSpec(written, dtype, shape))
    return tuple(found)


def table(plan: Plan, options: CompressOptions) -> list[dict[str, Any]]:
    """One row for matrices that differ by their layer alone, as `--dry-run` shows it."""
    counts = Counter[tuple[str, int, int, int | str | None]]()
    for matrix in plan.matrices:
        name = matrix.written.replace(f".{matrix.layer}.", ".*.", 1)
        group = None if options.bits == 16 else matrix.group or "channel"
        counts[name, matrix.rows, matrix.columns, group] += 1
    return [
        {"name": name, "layers": count, "rows": rows, "columns": columns, "bits": options.bits, "group_size": group}
        for (name, rows, columns, group), count in counts.items()
    ]


def estimate(options: CompressOptions, layout: Layout) -> Estimate:
    """Bytes and operations of a run: two forwards of the layers, a Hessian each group of inputs, the sweep."""
    plan = draw_up(options, layout)
    tensors = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs(plan, options, layout)}
    output = sum(nbytes(dtype, shape) for dtype, shape in tensors.values())
    moved = sum(nbytes(dtype, shape) for dtype, shape in layout.tensors.values()) + output
    parameters = Counter[int]()
    hessians = Counter[int]()
    for matrix in plan.matrices:
        parameters[matrix.layer] += matrix.rows * matrix.columns
        hessians[matrix.layer] += matrix.columns**2
    embedding = max(math.prod(shape) for _, shape in layout.tensors.values())
    largest = max(parameters.values())
    flops, hidden, statistics = 0, 0, 0
    if options.needs_text or options.calibration_text:
        length = sequence_length(options, layout.config)
        tokens = (options.samples + held_out_samples(options.samples)) * length
        width = min(matrix.columns for matrix in plan.matrices)
        hidden = 4 * tokens * width
        statistics = 2 * 4 * max(hessians.values())
        flops = sum(4 * tokens * n for n in parameters.values()) + sum(2 * tokens * n for n in hessians.values())
    if options.method == "gptq":
        flops += sum(2 * m.rows * m.columns**2 + 2 * m.columns**3 for m in plan.matrices)
    working = 4 * (4 * largest + 2 * max(m.columns for m in plan.matrices) ** 2)
    config = dict(layout.config)
    if options.packs:
        config["quantization_config"] = quantization_config(
            {m.module: scheme_of(m, options) for m in plan.matrices}, []
        )
    return Estimate(
        layout=Layout(tensors, config),
        output_bytes=output,
        peak_host_bytes=hidden + statistics + working + 4 * embedding,
        peak_device_bytes=statistics + working + 4 * embedding,
        flops=flops,
        bytes_moved=moved,
        details={"matrices": table(plan, options), "skipped": list(plan.skipped)},
    )


def sequence_length(options: CompressOptions, config: Mapping[str, Any]) -> int:
    """Tokens of a calibration sequence. Raises InputError past the model's positions."""
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int) or limit < 1:
        return options.sequence_length or 2048
    if options.sequence_length is not None and options.sequence_length > limit:
        raise InputError(f"`--sequence-length {options.sequence_length}` is past the model's {limit} positions")
    return options.sequence_length or min(2048, limit)


def held_out_samples(samples: int) -> int:
    """Sequences beside the calibration's own on which errors are reported."""
    return max(1, min(16, samples // 8))
