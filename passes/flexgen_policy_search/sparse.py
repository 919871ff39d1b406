"""Contextual sparsity in the model of a search: what predictors that are attached leave unread. Stdlib only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from rewright.passes import registry
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.sites import TARGETS, Target, settle, shape_of
from rewright.passes.spec import Layout

# A token's step is sparse for so many rows at most, where a stamp does not say.
_ROWS = 16
_TRAINER = "dejavu-predictor-train"


@dataclass(frozen=True, slots=True)
class Predicted:
    """Modules of a layer that are read sparsely, the share of their bytes a token reads, and that of predictors."""

    modules: frozenset[str]
    share: float
    predictors: float
    rows: int


def predicted(layout: Layout) -> tuple[Predicted | None, list[str]]:
    """What the predictors that a checkpoint was given leave to be read, as its stamp tells; and what to say of them."""
    made = [stage for stage in layout.made if stage.get("pass") == _TRAINER or not _attaches(stage)]
    if not made or made[-1].get("pass") != _TRAINER:
        return None, []
    options, metrics = made[-1].get("options"), made[-1].get("metrics")
    if not isinstance(metrics, Mapping):
        return None, ["predictors that are yet to be trained are not counted: what they leave unread is not known"]
    share, beside = metrics.get("density"), metrics.get("predictor_share")
    if not (isinstance(share, float) and isinstance(beside, float) and 0 <= share <= 1 and 0 <= beside <= 1):
        return None, ["predictors are attached, and their stamp does not say what they leave unread"]
    said: Mapping[str, Any] = options if isinstance(options, Mapping) else {}
    try:
        shape = shape_of(layout.config)
        asked = [word for word in str(said.get("targets", "")).split(",") if word in TARGETS]
        targets = settle(shape, cast(tuple[Target, ...], tuple(asked)))
    except (InputError, UsageError):
        return None, ["predictors are attached to a model that is not known to be sparse"]
    sites = [site for part in shape.covered(targets).values() for site in part]
    modules = {name for site in sites for name in shape.members(site)}
    if "heads" in targets:
        modules.add(shape.places.attention[0])
    rows = [int(word) for word in str(said.get("batch-buckets", "")).split(",") if word.isdecimal()]
    return Predicted(frozenset(modules), share, beside, max(rows, default=_ROWS)), []


def _attaches(stage: Mapping[str, Any]) -> bool:
    """Whether a stage left the weights, and so what was trained on them, as they were."""
    spec = registry.SPECS.get(str(stage.get("pass")))
    return spec is not None and spec.gives == "attachment"
