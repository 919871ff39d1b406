"""The triangular factor of a filter's basis and its slopes, without the basis at full length.

Columns Phi are p^t over the window (States says how), slopes are (t / n) p^t. A block of B steps has an orthogonal
factorisation Q R, and any later block is the first one times small matrices, because p^(t + s) = p^s p^t and the slope
there is that of the block plus s / n times the basis, turned alike. So two equal neighbours are factored by the QR of
[R; R G], of as many rows as there are columns, and a window of n steps takes log2(n / B) such factorisations, with
every target projected on the way. The result is as accurate as a QR factorisation of the whole basis: normal equations
would lose what is below the square root of the machine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.hyena_distill.states import States


@dataclass(frozen=True, slots=True)
class Factor:
    """With X the basis, and its slopes if asked for: X = Q `triangle`, `inside` = Q^T g, `outside` = |g - Q Q^T g|.

    `triangle` [C, r, columns], `inside` [C, r], `outside` [C].
    """

    triangle: torch.Tensor
    inside: torch.Tensor
    outside: torch.Tensor


def factor(states: States, samples: torch.Tensor, *, slopes: bool, horizon: int | None = None) -> Factor:
    """Factor the basis of `states` over the window of `samples` [C, n], n >= 1.

    `horizon`, if given, is a number of steps >= n up to which the recurrence is held to zero after the samples.
    """
    channels, length = samples.shape
    columns = states.order * (2 if slopes else 1)
    least = max(64, 2 * columns)
    blocks = 1 << max((length // least).bit_length() - 1, 0)
    size = length // blocks
    whole = blocks * size
    first = _basis(states, size, length, slopes)
    Q, R = torch.linalg.qr(first)
    pieces = samples[:, :whole].reshape(channels, blocks, size)
    inside, outside = _project(Q, pieces)
    reach = size
    while blocks > 1:
        Q, R = torch.linalg.qr(torch.cat([R, _later(states, R, reach, length)], dim=1))
        inside, missed = _project(Q, inside.reshape(channels, blocks // 2, -1))
        outside = outside + missed
        blocks, reach = blocks // 2, 2 * reach
    inside = inside[:, 0]
    if whole < length:
        rest = _later(states, _basis(states, length - whole, length, slopes), whole, length)
        Q, R = torch.linalg.qr(torch.cat([R, rest], dim=1))
        together = torch.cat([inside, samples[:, whole:]], dim=1)
        inside, missed = _project(Q, together[:, None])
        inside, outside = inside[:, 0], outside + missed
    reach = length
    while horizon is not None and reach < horizon:
        Q, R = torch.linalg.qr(torch.cat([R, _later(states, R, reach, length)], dim=1))
        together = torch.cat([inside, torch.zeros_like(inside)], dim=1)
        inside, missed = _project(Q, together[:, None])
        inside, outside, reach = inside[:, 0], outside + missed, 2 * reach
    return Factor(R, inside, outside.sqrt())


def _basis(states: States, steps: int, length: int, slopes: bool) -> torch.Tensor:
    """[C, steps, columns]."""
    time = torch.arange(steps, dtype=torch.float64, device=states.decay.device)[:, None]
    phase = states.angle[:, None] * time
    wave = torch.where(states.kinds()[:, None] == 2, -phase.sin(), phase.cos())
    values = wave * (-states.decay[:, None] * time).exp()
    return torch.cat([values, values * (time / length)], dim=2) if slopes else values


def _later(states: States, rows: torch.Tensor, steps: int, length: int) -> torch.Tensor:
    """Rows of a basis, [C, r, columns], as they are so many steps later."""
    order = states.order
    size = (-states.decay * steps).exp()
    cosine = (size * (states.angle * steps).cos())[:, None]
    sine = (size * (states.angle * steps).sin())[:, None]
    kinds = states.kinds()[:, None]
    sine = torch.where(kinds == 1, sine, torch.where(kinds == 2, -sine, 0.0))
    partners = states.partners()[:, None].expand(-1, rows.shape[1], -1)

    def turned(part: torch.Tensor) -> torch.Tensor:
        return part * cosine + part.gather(2, partners) * sine

    values = rows[:, :, :order]
    if rows.shape[2] == order:
        return turned(values)
    return torch.cat([turned(values), turned(rows[:, :, order:] + values * (steps / length))], dim=2)


def _project(Q: torch.Tensor, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [C, blocks, r] of `pieces` [C, blocks, rows], and the sum of squares [C] of what is left."""
    inside = pieces @ Q
    return inside, (pieces - inside @ Q.transpose(1, 2)).square().sum(dim=(1, 2))
