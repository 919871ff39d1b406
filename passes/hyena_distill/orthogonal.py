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

from rewright.passes.hyena_distill.rules import PLAIN, Rules
from rewright.passes.hyena_distill.states import States


@dataclass(frozen=True, slots=True)
class Factor:
    """With X the basis, and its slopes if asked for: X = Q `triangle`, `inside` = Q^T g, `outside` = |g - Q Q^T g|.

    `triangle` [C, r, columns], `inside` [C, r], `outside` [C].
    """

    triangle: torch.Tensor
    inside: torch.Tensor
    outside: torch.Tensor


def factor(states: States, samples: torch.Tensor, rules: Rules = PLAIN, *, slopes: bool) -> Factor:
    """Factor the basis of `states` over the window of `samples` [C, n], n >= 1, in the norm of `rules`.

    The last rows of X are the rounding of each mode, at which g is zero.
    """
    found = _blocks(states, samples, slopes) if rules.weighting is None else _whole(states, samples, rules, slopes)
    length = samples.shape[1]
    if rules.horizon is not None and rules.weighting is None:
        reach = length
        while reach < rules.horizon:
            found = _with(found, _later(states, found.triangle, reach, length))
            reach *= 2
    rounding = torch.diag_embed(rules.noise * states.norms(length))
    if slopes:
        rounding = torch.cat([rounding, torch.zeros_like(rounding)], dim=2)
    return _with(found, rounding)


def _with(found: Factor, rows: torch.Tensor, targets: torch.Tensor | None = None) -> Factor:
    """With `rows` [C, r, columns] more, at which g is `targets` [C, r] or zero."""
    Q, R = torch.linalg.qr(torch.cat([found.triangle, rows], dim=1))
    if targets is None:
        targets = rows.new_zeros(rows.shape[:2])
    inside, missed = _project(Q, torch.cat([found.inside, targets], dim=1)[:, None])
    return Factor(R, inside[:, 0], torch.hypot(found.outside, missed.sqrt()))


def _blocks(states: States, samples: torch.Tensor, slopes: bool) -> Factor:
    """The factor over the window in the plain norm, by blocks."""
    channels, length = samples.shape
    least = max(64, 2 * states.order * (2 if slopes else 1))
    blocks = 1 << max((length // least).bit_length() - 1, 0)
    size = length // blocks
    whole, reach = blocks * size, size
    Q, R = torch.linalg.qr(_basis(states, size, length, slopes))
    inside, outside = _project(Q, samples[:, :whole].reshape(channels, blocks, size))
    while blocks > 1:
        Q, R = torch.linalg.qr(torch.cat([R, _later(states, R, reach, length)], dim=1))
        inside, missed = _project(Q, inside.reshape(channels, blocks // 2, -1))
        outside = outside + missed
        blocks, reach = blocks // 2, 2 * reach
    found = Factor(R, inside[:, 0], outside.sqrt())
    if whole == length:
        return found
    rest = _later(states, _basis(states, length - whole, length, slopes), whole, length)
    return _with(found, rest, samples[:, whole:])


def _whole(states: States, samples: torch.Tensor, rules: Rules, slopes: bool) -> Factor:
    """The factor in a weighted norm: the basis at full length, convolved."""
    assert rules.weighting is not None
    length = samples.shape[1]
    steps = length if rules.horizon is None else 2 * length
    basis = _basis(states, steps, length, slopes).transpose(1, 2)
    samples = torch.nn.functional.pad(samples, (0, steps - length))
    basis = convolved(basis, rules.weighting.unsqueeze(-2)).transpose(1, 2)
    Q, R = torch.linalg.qr(basis)
    inside, missed = _project(Q, convolved(samples, rules.weighting)[:, None])
    return Factor(R, inside[:, 0], missed.sqrt())


def convolved(signals: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Causal convolution along the last axis, as long as `signals`; leading axes broadcast."""
    length = signals.shape[-1]
    response = response[..., :length]
    period = 1 << (length + response.shape[-1] - 1).bit_length()
    spectrum = torch.fft.rfft(signals, period) * torch.fft.rfft(response, period)
    found: torch.Tensor = torch.fft.irfft(spectrum, period)[..., :length]
    return found


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
