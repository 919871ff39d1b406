"""`convert`: what it takes and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rewright.passes.convert import output, recurrences
from rewright.passes.spec import Estimate, Layout, Opt, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The one option of `convert`."""

    to: Annotated[
        Literal["pack-quantized", "bitmask-w4", "stripedhyena-modal", "modal", "dense"],
        Opt(
            "codes as compressed-tensors packs them, or of kept weights beside a mask; recurrences as StripedHyena"
            " stores them, or as `hyena-distill` does; or decoded weights"
        ),
    ]


def estimate(options: ConvertOptions, layout: Layout) -> Estimate:
    """What a conversion takes, from headers. Raises what the forms refuse."""
    if options.to == "stripedhyena-modal" or options.to == "modal":
        return recurrences.estimate(options.to, layout)
    return output.estimate(options.to, layout)


CONVERT = Spec(
    name="convert",
    summary="write a compressed model in another form, without loss",
    version=1,
    options=ConvertOptions,
    impl="rewright.passes.convert.run:run",
    wants=frozenset({"weights", "config"}),
    gives="weights",
    grain="layer",
    metrics=frozenset({"matrices", "sparsity", "bits_per_weight", "kept", "recurrences"}),
    paper="Compress, Then Prompt (arXiv:2305.11186)",
    splits=lambda options: True,
    estimate=estimate,
)
