"""`convert`: what it takes and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rewright.passes.convert.output import estimate
from rewright.passes.convert.plan import Form
from rewright.passes.spec import Opt, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The one option of `convert`."""

    to: Annotated[
        Form,
        Opt("codes as compressed-tensors packs them, codes of kept weights beside a mask, or decoded weights"),
    ]


CONVERT = Spec(
    name="convert",
    summary="write a compressed model in another form, without loss",
    version=1,
    options=ConvertOptions,
    impl="rewright.passes.convert.run:run",
    wants=frozenset({"weights", "config"}),
    gives="weights",
    grain="layer",
    metrics=frozenset({"matrices", "sparsity", "bits_per_weight", "kept"}),
    paper="Compress, Then Prompt (arXiv:2305.11186)",
    splits=lambda options: True,
    estimate=estimate,
)
