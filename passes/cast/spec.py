"""`cast`: what it takes, which tensors take another dtype, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rewright.formats.dtypes import FLOATS, nbytes, stored_float
from rewright.formats.files import CHUNK
from rewright.formats.foreign import bound
from rewright.formats.layout import TensorSpec, plan_shards
from rewright.formats.model_dtype import dtype_changes
from rewright.passes.errors import UsageError
from rewright.passes.spec import Estimate, Layout, Opt, Spec
from rewright.passes.values import ByteSize, Regex


@dataclass(frozen=True, slots=True, kw_only=True)
class CastOptions:
    """The options of `cast`."""

    to: Annotated[Literal["f8_e4m3", "f32", "f16", "bf16"], Opt("dtype of every float tensor that is no scale")]
    keep: Annotated[tuple[Regex, ...], Opt("names with this in them stay (repeatable)", metavar="REGEX")] = ()
    max_shard_size: Annotated[ByteSize, Opt("most bytes in a weight file", metavar="SIZE")] = ByteSize(5 * 10**9)


def specs(options: CastOptions, layout: Layout) -> list[TensorSpec]:
    """The tensors of the result. Raises FormatError as `bound` does, UsageError for a `--keep` that no name has."""
    for regex in options.keep:
        if not any(map(regex.found_in, layout.tensors)):
            raise UsageError(f"`--keep {regex}` matches no tensor", hint="`rewright show` lists a checkpoint's tensors")
    stay = bound(layout.tensors, layout.config)
    stay |= {name for name in layout.tensors if any(regex.found_in(name) for regex in options.keep)}
    if options.to != "f32":
        stay |= recurrences(layout)
    plain = (*FLOATS, "F8_E4M3", "F8_E5M2")
    return [
        TensorSpec(name, options.to.upper() if dtype in plain and name not in stay else dtype, tuple(shape))
        for name, (dtype, shape) in layout.tensors.items()
    ]


def recurrences(layout: Layout) -> set[str]:
    """Poles and what stands beside them: a pole in half precision has lost its filter."""
    stems = {name.rpartition(".")[0] for name in layout.tensors if name.endswith((".poles", ".log_poles"))}
    return {name for name in layout.tensors if name.rpartition(".")[0] in stems}


def config(options: CastOptions, layout: Layout, made: list[TensorSpec]) -> dict[str, Any]:
    """The top-level keys of config.json that change: none for 8 bits, which readers widen to the dtype of before."""
    code = options.to.upper()
    said = dtype_changes(layout.config, code if code in FLOATS else None, stored_float(layout.tensors))
    return said if any(spec.dtype == code for spec in made) else {}


def _estimate(options: CastOptions, layout: Layout) -> Estimate:
    made = specs(options, layout)
    read = {name: nbytes(*spec) for name, spec in layout.tensors.items()}
    written = sum(spec.nbytes for spec in made)
    cast = [spec for spec in made if spec.dtype != layout.tensors[spec.name][0]]
    return Estimate(
        layout=Layout({s.name: (s.dtype, s.shape) for s in made}, {**layout.config, **config(options, layout, made)}),
        output_bytes=written,
        # a tensor before and after, and pieces of it under way
        peak_host_bytes=max((read[spec.name] + spec.nbytes for spec in cast), default=0) + 3 * CHUNK,
        peak_device_bytes=0,
        flops=0,
        bytes_moved=8 * (sum(read.values()) + written),
        details={"cast": len(cast), "files": len(plan_shards(made, options.max_shard_size.count))},
    )


CAST = Spec(
    name="cast",
    summary="write the float tensors of a checkpoint in another dtype",
    version=2,
    options=CastOptions,
    impl="rewright.passes.cast.run:run",
    wants=frozenset({"weights"}),
    gives="weights",
    grain="layer",
    metrics=frozenset({"cast", "kept", "bytes_before", "bytes_after", "largest_relative_error", "zeroed"}),
    paper="FP8 Formats for Deep Learning (arXiv:2209.05433)",
    splits=lambda options: True,
    estimate=_estimate,
)
