"""The mixers of Hyena models: projections through a short filter, gates, long filters.

Without a cache a mixer convolves. With one it goes on from what the cache holds: a distilled mixer by its recurrence,
in constant memory; any other from all its inputs so far, in memory that grows with the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rewright.kernels.modal_step import modal_step
from rewright.passes.models.hyena_filter import ImplicitFilter, ModalFilter
from rewright.passes.models.hyena_long import Long
from rewright.passes.models.hyena_state import HyenaLayer


class Mixer(nn.Module):
    """What the mixers share; `groups` is how many signals each long filter is applied to, in one row of the batch.

    `watch` is called with what the long filters meet, as `Long` is.
    """

    def __init__(self, config: Any, index: int, projections: int, groups: int) -> None:
        super().__init__()
        width = projections * config.d_model
        self.groups = groups
        self.watch: Callable[[torch.Tensor, slice], None] | None = None
        self.in_proj = nn.Linear(config.d_model, width)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.short_filter = nn.Conv1d(width, width, config.short_filter_order, groups=width)
        self.filter_fn: ImplicitFilter | None = None
        self.modal: ModalFilter | None = None
        if config.modal is None:
            self.filter_fn = ImplicitFilter(config)
        else:
            self.modal = ModalFilter(config.filters, config.modal["entries"][index], config.modal.get("fir_head", 0))

    def impulse(self, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The impulse responses of the long filters, (filters, length), what the mixer adds of its input in h_0."""
        source = self.modal if self.modal is not None else self.filter_fn
        assert source is not None
        return source.impulse(length, dtype)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None, layer: HyenaLayer | None = None
    ) -> torch.Tensor:
        """Hidden states (rows, length, width) to as many; `mask` (rows, length) is 0 where there is no token."""
        mixed = None if layer is None or mask is not None else self._step(hidden, layer)
        if mixed is None:
            mixed = self._mix(self._project(hidden, mask, layer), Long(self, layer))
        if layer is not None:
            layer.seen += hidden.shape[1]
            layer.is_initialized = True
        out: torch.Tensor = self.out_proj(mixed.transpose(1, 2))
        return out

    def _step(self, hidden: torch.Tensor, layer: HyenaLayer) -> torch.Tensor | None:
        """What the mixer makes of one token, (rows, width, 1), where there is one launch for all of it."""
        return None

    def _project(self, hidden: torch.Tensor, mask: torch.Tensor | None, layer: HyenaLayer | None) -> torch.Tensor:
        """Projections after the short filter, (rows, projections * width, length).

        What is masked is zero on both sides of the short filter: it would reach the first tokens by its taps, and the
        long filters by its bias. So a row reads as if it had no padding.
        """
        projected = self.in_proj(hidden).transpose(1, 2)
        keep = None if mask is None else mask[:, None].to(projected.dtype)
        if keep is not None:
            projected = projected * keep
        weight, length = self.short_filter.weight[:, 0], projected.shape[2]
        before = weight.shape[1] - 1
        tail = None if layer is None else layer.tail
        if tail is None:
            tail = projected.new_zeros(*projected.shape[:2], before)
        padded = torch.cat([tail.to(projected.device), projected], dim=2)
        if layer is not None:
            # of its own memory, else the whole text's stays
            layer.tail = padded[:, :, length:].clone()
        found = padded[:, :, :length] * weight[:, :1] + self.short_filter.bias[:, None]  # type: ignore[index]
        for tap in range(1, before + 1):
            found = found + padded[:, :, tap : tap + length] * weight[:, tap, None]
        return found if keep is None else found * keep

    def _mix(self, projected: torch.Tensor, long: Long) -> torch.Tensor:
        raise NotImplementedError


class HyenaMixer(Mixer):
    """Hyena of any order: v <- filter_o(v x_o) for each but the first gate, then v x_0 (Poli et al. 2023)."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index, config.hyena_order + 1, config.hyena_order - 1)
        self.dropout = nn.Dropout(config.hyena_dropout)

    def _mix(self, projected: torch.Tensor, long: Long) -> torch.Tensor:
        first, *gates, value = projected.chunk(self.groups + 2, dim=1)
        for stage, gate in enumerate(reversed(gates)):
            # filters of one channel stand together, one for each stage
            value = long(self.dropout(value * gate)[:, None], slice(stage, None, self.groups), stage)[:, 0]
        return long.finish(value * first)

    def _step(self, hidden: torch.Tensor, layer: HyenaLayer) -> torch.Tensor | None:
        modal = self.modal
        if self.groups != 1 or modal is None or modal.taps or torch.is_grad_enabled():
            return None
        if hidden.shape[1] != 1 or layer.tail is None or layer.state is None:
            return None
        now = self.in_proj(hidden[:, 0])
        # both are moved on in place
        recent, state = layer.tail, layer.state[:, 0]
        if recent.device != now.device or recent.dtype != now.dtype or state.dtype != modal.residues.dtype:
            return None
        weight, bias = self.short_filter.weight[:, 0], self.short_filter.bias
        return modal_step(now, recent, weight, bias, state, modal.poles, modal.residues, modal.h0)[:, :, None]


class MultiHyenaMixer(Mixer):
    """Heads of width N: y_t = (h * z)_t q_t, z = k v^T, one filter for a head's N^2 signals (arXiv:2310.18780)."""

    def __init__(self, config: Any, index: int) -> None:
        self.heads, self.width = config.num_heads, config.d_model // config.num_heads
        super().__init__(config, index, 3, self.width**2)

    def _mix(self, projected: torch.Tensor, long: Long) -> torch.Tensor:
        rows, _, length = projected.shape
        parts = projected.view(rows, 3, self.heads, self.width, length).transpose(2, 3)
        query, key, value = parts.unbind(1)
        outer = (key[:, :, None] * value[:, None]).flatten(1, 2)
        found = long(outer, slice(None), 0).view(rows, self.width, self.width, self.heads, length)
        mixed = (found * query[:, None]).sum(2)
        return long.finish(mixed.transpose(1, 2).flatten(1, 2))
