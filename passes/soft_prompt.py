"""Learned prompts: what they were learned on, whether they fit a checkpoint, and the one that is attached to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewright.formats import peft
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import Adapter, Base, Depth, Heads
from rewright.passes.errors import InputError

if TYPE_CHECKING:
    import torch

# Bytes of an embedding that are read at a time.
_PIECE = 1 << 24


def table_of(source: Checkpoint) -> str:
    """The stored name of a checkpoint's token embedding. Raises InputError."""
    from rewright.passes.models.families import family_of
    from rewright.passes.weights import Weights

    return Weights(source).find(family_of(source.config).embedding)


def base_of(source: Checkpoint) -> Base:
    """Width, rows and checksum of a checkpoint's token embedding, read piece by piece.

    The checksum is of the values rounded to bfloat16, so that a table in float32 and the same in bfloat16 have one.
    """
    import torch

    name = table_of(source)
    rows, width = source.entry(name).shape
    digest = hashlib.sha256()
    step = max(1, _PIECE // max(1, 4 * width))
    for start in range(0, rows, step):
        values = source.read_rows(name, start, start + step).to(torch.bfloat16)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return Base(width, rows, digest.hexdigest())


def width_of(depth: Depth, width: int, config: Mapping[str, Any]) -> int:
    """Numbers of a prompt's token for a model whose embedding is so wide."""
    return Heads.of(config).numbers if depth == "all" else width


def check(adapter: Adapter, base: Base, source: Checkpoint) -> list[str]:
    """Ways in which a checkpoint is not the base that a prompt was learned on, as far as the prompt's file tells.

    Raises InputError for another width, with which nothing can be done.
    """
    where = source.path
    if adapter.width != (width := width_of(adapter.depth, base.width, source.config or {})):
        raise InputError(f"the prompt `{adapter.source.path}` is {adapter.width} wide, and `{where}` takes {width}")
    found = adapter.base
    if found is None:
        return []
    if found.rows != base.rows:
        return [f"its base has {found.rows} rows of embedding, and `{where}` has {base.rows}"]
    return ["its base has another embedding of the same size"] if found.checksum != base.checksum else []


def load(adapter: Adapter) -> torch.Tensor:
    """Read a prompt, float32 (tokens, width). Raises InputError when it has a value that is not finite."""
    import torch

    from rewright.passes.finite import all_finite

    embeddings = adapter.source.read(peft.TENSOR)
    if not all_finite(embeddings):
        raise InputError(f"the prompt `{adapter.source.path}` has values that are not finite")
    return embeddings.to(torch.float32)


def attached(source: Checkpoint) -> Adapter | None:
    """The prompt that is attached to a checkpoint, from its header. Raises FormatError for one that is damaged."""
    path = peft.attached(source.root)
    return None if path is None else peft.read_adapter(path)


def files(prompt: torch.Tensor, depth: Depth, base: Base, learned: str, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that attach a prompt (tokens, width) to a checkpoint."""
    import torch

    data = prompt.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return peft.files(depth, prompt.shape[0], prompt.shape[1], data, base, learned, config)
