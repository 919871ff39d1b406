"""How a mixer's long filters are applied: by convolution, or going on from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewright.kernels.modal_chunk_prefill import modal_chunk_prefill
from rewright.passes.models.hyena_filter import ModalFilter, convolve

if TYPE_CHECKING:
    from rewright.passes.models.hyena_state import HyenaLayer


class Long:
    """The long filters of one mixer for one stretch of text; `finish` writes what they leave into the cache.

    `mixer` has `impulse(length, dtype)`, and `modal` where it was distilled. Results are in the dtype of the inputs;
    what is computed and kept is float32, or float64 where the filters are.
    """

    def __init__(self, mixer: Any, layer: HyenaLayer | None) -> None:
        self.mixer, self.layer = mixer, layer
        self.modal: ModalFilter | None = mixer.modal
        held = mixer.filter_fn.bias if self.modal is None else self.modal.h0
        self.dtype = torch.promote_types(torch.float32, held.dtype)
        self._left: dict[str, list[torch.Tensor]] = {"state": [], "recent": [], "inputs": []}
        self._responses: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor, which: slice, place: int) -> torch.Tensor:
        """Filters `which` applied to inputs (rows, groups, filters, length), what is kept of which is at `place`."""
        if inputs.shape[-1] == 0:
            return inputs
        if self.mixer.watch is not None:
            self.mixer.watch(inputs, which)
        found = self._apply(inputs.to(self.dtype), which, slice(place, place + inputs.shape[1]))
        return found.to(inputs.dtype)

    def _apply(self, inputs: torch.Tensor, which: slice, place: slice) -> torch.Tensor:
        if self.layer is None:
            return convolve(inputs, self._impulse(inputs.shape[-1])[which])
        if self.modal is None:
            return self._recall(self.layer, inputs, which, place)
        return self._recur(self.layer, self.modal, inputs, which, place)

    def finish(self, mixed: torch.Tensor) -> torch.Tensor:
        """Keep what was left, and hand `mixed` on."""
        if self.layer is not None:
            for name, parts in self._left.items():
                if parts:
                    setattr(self.layer, name, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return mixed

    def _impulse(self, length: int) -> torch.Tensor:
        if self._responses is None:
            self._responses = self.mixer.impulse(length, self.dtype)
        return self._responses

    def _recall(self, layer: HyenaLayer, inputs: torch.Tensor, which: slice, place: slice) -> torch.Tensor:
        if layer.inputs is not None:
            inputs = torch.cat([layer.inputs[:, place].to(inputs.device), inputs], dim=-1)
        self._left["inputs"].append(inputs)
        length, before = inputs.shape[-1], 0 if layer.inputs is None else layer.inputs.shape[-1]
        responses = self._lasting(layer, length)[which]
        if length - before == 1:
            return (inputs * responses.flip(-1)).sum(-1, keepdim=True)
        return convolve(inputs, responses)[..., before:]

    def _lasting(self, layer: HyenaLayer, length: int) -> torch.Tensor:
        """Responses that are made again only when the text is twice as long."""
        if layer.impulse is None or layer.impulse.shape[1] < length:
            most = self.mixer.filter_fn.positions
            room = length if length > most else min(most, 1 << (length - 1).bit_length())
            layer.impulse = self.mixer.impulse(room, self.dtype)
        return layer.impulse[:, :length]

    def _recur(
        self, layer: HyenaLayer, modal: ModalFilter, inputs: torch.Tensor, which: slice, place: slice
    ) -> torch.Tensor:
        state = None if layer.state is None else layer.state[:, place].to(inputs.device)
        if state is None:
            state = inputs.new_zeros(*inputs.shape[:3], modal.poles.shape[1], 2)
        h0, delayed, head = modal.h0[which].to(self.dtype), inputs, None
        if modal.taps:
            head, delayed = self._head(layer, modal, inputs, which, place)
            head, h0 = head + inputs * h0[:, None], torch.zeros_like(h0)
        traced = torch.is_grad_enabled() and (inputs.requires_grad or modal.poles.requires_grad)
        if inputs.shape[-1] == 1 or traced:
            found, state = self._steps(delayed, modal, which, h0, state)
        else:
            shape, logs, residues = inputs.shape[:2], modal.logs()[which], modal.residues[which].to(self.dtype)
            found, state = modal_chunk_prefill(delayed.flatten(0, 1), logs, residues, h0, state.flatten(0, 1))
            found, state = (part.view(*shape, *part.shape[1:]) for part in (found, state))
        self._left["state"].append(state)
        return found if head is None else found + head

    def _steps(
        self, inputs: torch.Tensor, modal: ModalFilter, which: slice, h0: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample by sample, as gradients need it."""
        # not as a view: what a file holds is not aligned as complex numbers are taken to be
        held = (part[which].to(self.dtype).unbind(-1) for part in (modal.poles, modal.residues))
        poles, residues = (torch.complex(*planes) for planes in held)
        values, outputs = torch.view_as_complex(state), []
        for now in inputs.unbind(-1):
            outputs.append(h0 * now + (residues * values).real.sum(-1))
            values = poles * values + now[..., None]
        return torch.stack(outputs, dim=-1), torch.view_as_real(values)

    def _head(
        self, layer: HyenaLayer, modal: ModalFilter, inputs: torch.Tensor, which: slice, place: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first taps add, and the inputs as late as they reach the state."""
        if layer.recent is None:
            recent = inputs.new_zeros(*inputs.shape[:3], modal.taps)
        else:
            recent = layer.recent[:, place].to(inputs.device)
        joined, length = torch.cat([recent, inputs], dim=-1), inputs.shape[-1]
        self._left["recent"].append(joined[..., length:].clone())
        weight = modal.fir[which].to(self.dtype).flip(-1)[:, None]
        found = nn.functional.conv1d(joined[..., :-1].flatten(0, 1), weight, groups=len(weight))
        return found.view(inputs.shape), joined[..., :length]
