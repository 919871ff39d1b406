"""`cast` at work: one tensor after the other is read, rounded and written."""

from __future__ import annotations

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.dtypes import to_torch
from rewright.passes.cast.spec import CastOptions, config, specs
from rewright.passes.context import Context
from rewright.passes.rounding import rounded
from rewright.passes.spec import Layout, Metrics
from rewright.passes.writing import carry, write_by_layer


def run(context: Context, options: CastOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Write every tensor, in its own dtype or in the one asked for. Raises BoundError as `rounded` does."""
    layout = Layout.of(source)
    made = specs(options, layout)
    cast = {s.name: to_torch(s.dtype) for s in made if s.dtype != source.entries[s.name].dtype}
    draft.declare(made, options.max_shard_size.count)

    def write(name: str) -> tuple[float, int]:
        if (dtype := cast.get(name)) is None:
            draft.copy(name, source)
            return 0.0, 0
        tensor, largest, zeroed = rounded(source.read(name), dtype, name)
        draft.write(name, tensor)
        return largest, zeroed

    errors = write_by_layer(context, draft, "cast, tensors", layout.tensors, write)
    carry(context, source, draft)
    if changes := config(options, layout, made):
        draft.edit_config(changes)
    return {
        "cast": len(cast),
        "kept": len(made) - len(cast),
        "bytes_before": source.total_bytes,
        "bytes_after": sum(spec.nbytes for spec in made),
        "largest_relative_error": max((largest for largest, _ in errors.values()), default=0.0),
        "zeroed": sum(zeroed for _, zeroed in errors.values()),
    }
