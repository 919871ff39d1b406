"""The definition of `modal_chunk_prefill`: matrix products over chunks, and a short loop that hands the state on."""

from __future__ import annotations

import torch

from rewright.kernels.modal import ELEMENTS, columns, powers, rows, to_complex

CHUNK = 64
# Samples of a channel that go through at a time are at least so many, and so many chunks are padded at most.
LEAST = 16 * CHUNK


def modal_chunk_prefill(
    u: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y` and `state`; see the package for the mathematics, shapes and dtypes."""
    batch, channels, times = u.shape
    entries = logs.shape[1]
    dtype = torch.promote_types(u.dtype, residues.dtype)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shape = (batch, channels, entries, 2)
    out = torch.zeros(shape, dtype=dtype, device=u.device) if state is None else state.to(dtype).clone()
    if y.numel() == 0:
        return y, out
    chunk = min(CHUNK, times)
    span = max(LEAST, ELEMENTS // max(batch * 64, 1) // chunk * chunk)
    step = max(1, ELEMENTS // max(batch * min(span, times), chunk * chunk))
    for start in range(0, channels, step):
        part = slice(start, start + step)
        filters = _Filters(logs[part].double(), residues[part], h0[part], chunk, dtype)
        carried = to_complex(out[:, part]).transpose(0, 1)
        whole = times // chunk * chunk
        for begin in range(0, whole, span):
            here = slice(begin, min(begin + span, whole))
            carried = filters.through(u[:, part, here], carried, y[:, part, here])
        if whole < times:
            rest = _Filters(logs[part].double(), residues[part], h0[part], times - whole, dtype)
            carried = rest.through(u[:, part, whole:], carried, y[:, part, whole:])
        out[:, part] = torch.view_as_real(carried.transpose(0, 1))
    return y, out


class _Filters:
    """What a chunk of `chunk` samples of some channels is multiplied by."""

    def __init__(
        self, logs: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor, chunk: int, dtype: torch.dtype
    ) -> None:
        table = powers(logs, chunk + 1)
        weighted = table[..., :chunk] * to_complex(residues)[..., None]
        # From the state before a chunk to the output i samples in: R p^i.
        self.readout = rows(weighted, dtype).transpose(1, 2)
        # Row s, column i holds h_(i-s), with zeros before h_0.
        h = torch.cat((h0.double()[:, None], weighted.real.sum(dim=1)[:, : chunk - 1]), dim=1).to(dtype)
        self.within = torch.nn.functional.pad(h, (chunk - 1, 0)).unfold(1, chunk, 1).flip(1)
        # From sample s of a chunk to the state after it: p^(chunk-1-s).
        self.gather = columns(table[..., :chunk].flip(2), dtype).transpose(1, 2)
        self.decay = table[..., chunk, None].transpose(1, 2)
        self.chunk, self.dtype = chunk, dtype

    def through(self, u: torch.Tensor, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Write y [batch, channels, n chunks] and return the state [channels, batch, entries] after it."""
        batch, channels, times = u.shape
        count = times // self.chunk
        tile = u.to(self.dtype).reshape(batch, channels, count, self.chunk).transpose(0, 1)
        flat = tile.reshape(channels, batch * count, self.chunk)
        gathered = torch.view_as_complex((flat @ self.gather).view(channels, batch, count, state.shape[2], 2))
        before = []
        # The state itself is carried in float64: it is what all later chunks have in common.
        for at in range(count):
            before.append(state)
            state = torch.addcmul(gathered[:, :, at].to(state.dtype), state, self.decay)
        planes = torch.view_as_real(torch.stack(before, dim=2)).to(self.dtype).flatten(3)
        found = torch.baddbmm(flat @ self.within, planes.flatten(1, 2), self.readout)
        y.copy_(found.view(channels, batch, times).transpose(0, 1))
        return state
