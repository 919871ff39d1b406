"""What a Hyena model keeps between tokens: a layer for the caches of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from rewright.passes.errors import InputError

_KEPT = ("tail", "state", "recent", "inputs")


class HyenaLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """The state of one mixer; rows of the batch come first in every tensor, None is a state that is still zero.

    tail     (rows, width, taps - 1)                 projections that the short filter reads again
    state    (rows, groups, filters, entries, 2)     of a distilled model, float32: as large at every position
    recent   (rows, groups, filters, taps of the head)  its inputs that have not reached the state
    inputs   (rows, groups, filters, tokens)         of any other: all that the long filters have read
    """

    # rows grow with the text, or are written without a fixed address
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.seen = 0
        self.tail: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.inputs: torch.Tensor | None = None
        # impulse responses, which belong to no row
        self.impulse: torch.Tensor | None = None

    def _each(self, change: Any) -> None:
        for name in _KEPT:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, change(held))

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        self.is_initialized = True

    def update(self, *_: Any, **__: Any) -> Any:
        raise InputError("a Hyena layer keeps no keys and values")

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen = 0
        for name in (*_KEPT, "impulse"):
            setattr(self, name, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda held: held[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda held: held.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._each(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Whatever reads the state moves it."""

    def crop(self, *_: Any) -> None:
        raise InputError("a recurrence cannot forget its last tokens", hint="generate without an assistant")


def layers_of(cache: Any, count: int) -> list[HyenaLayer]:
    """The layers of a transformers cache, made Hyena layers where it is still empty.

    Whoever makes a cache for any model gets one for keys and values. Raises InputError where it holds those.
    """
    held = cache.layers
    if len(held) == count and all(isinstance(layer, HyenaLayer) for layer in held):
        return list(held)
    if any(getattr(layer, "is_initialized", True) for layer in held):
        raise InputError("the cache is not one that a Hyena model can use", hint="give an empty `DynamicCache`")
    cache.layers = [HyenaLayer() for _ in range(count)]
    return list(cache.layers)
