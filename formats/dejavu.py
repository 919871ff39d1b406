"""Predictors of contextual sparsity as they are attached to a checkpoint: names, dtypes, and whose they are. Stdlib
only.

One safetensors file and one config. Of layer `l`:

| tensor | shape | dtype |
| --- | --- | --- |
| `layers.l.mlp.A`, `.B` | [rank, width], [neurons, rank] | BF16, or I8 with `A_scale` [rank], `B_scale` [neurons] F32 |
| `layers.l.mlp.a0`, `.c` | [rank], [neurons] | F32; a neuron is on where B (A x + a0) + c > 0 |
| `layers.l.mlp.ladder` | [levels, neurons] | F32: `c` at other budgets |
| `layers.l.mlp.bucket_shift` | [buckets] | F32, added to c for that many rows at a time |
| `layers.l.attn.W`, `.b` | [groups, width], [groups] | F32: a group is on where W x + b > 0 |
| `layers.l.attn.ladder` | [levels, groups] | F32: `b` at other budgets |
| `layers.l.SITE.threshold` | [columns] | F32: a column is read where its number is past it |
| `layers.l.SITE.ladder` | [levels] | F32: what thresholds are multiplied by at other budgets |
| `layers.l.mlp.weight`, `.SITE.weight` | [neurons], [columns] | F32: a number costs half its square times this |
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError, unreadable
from rewright.formats.strict import read_json

FOLDER = "attachments/dejavu"
WEIGHTS, CONFIG = "dejavu.safetensors", "dejavu_config.json"
SCHEMA = "dejavu/1"
# Of every tensor so many bytes at its start and end are part of a fingerprint.
_ENDS = 1024
_AGAIN = "train again with `rewright dejavu-predictor-train`"


# What a decode step does not read: thresholds of other budgets, what errors cost, and what few rows add.
_ASIDE = ("ladder", "weight", "bucket_shift")


def is_read(name: str) -> bool:
    """Whether a token's decode step reads a tensor of an attachment."""
    return name.rpartition(".")[2] not in _ASIDE


@dataclass(frozen=True, slots=True)
class Attached:
    """Predictors of a checkpoint: `source` has the tensors, `config` says what they are."""

    source: Checkpoint
    config: Mapping[str, Any]

    @property
    def read_bytes(self) -> int:
        """Bytes of predictors and thresholds that a token reads."""
        return sum(entry.nbytes for name, entry in self.source.entries.items() if is_read(name))


def fingerprint(source: Checkpoint) -> str:
    """sha256 over names, dtypes and shapes of all tensors, and the first and last KiB of each."""
    total = hashlib.sha256()
    for name in sorted(source.entries):
        entry = source.entries[name]
        total.update(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                total.update(file.read(min(_ENDS, entry.nbytes)))
                if entry.nbytes > _ENDS:
                    file.seek(entry.offset + entry.nbytes - _ENDS)
                    total.update(file.read(_ENDS))
        except OSError as error:
            raise unreadable(entry.file, error) from None
    return total.hexdigest()


def attached(source: Checkpoint) -> Attached | None:
    """The predictors that are attached to a checkpoint, None where there are none.

    Raises FormatError for damaged ones, and for those of other weights.
    """
    folder = source.root / FOLDER
    if not os.path.lexists(folder / CONFIG):
        return None
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        raise FormatError(f"`{folder / CONFIG}` is no `{SCHEMA}`", hint=_AGAIN)
    kinds = {"base": str, "method": str, **dict.fromkeys(("targets", "levels", "buckets", "densities"), list)}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise FormatError(f"`{folder / CONFIG}` has no `{key}`", hint=_AGAIN)
    if config["base"] != fingerprint(source):
        raise FormatError(
            f"the predictors in `{folder}` were trained on other weights than those of `{source.path}`", hint=_AGAIN
        )
    return Attached(Checkpoint.open(folder / WEIGHTS), config)
