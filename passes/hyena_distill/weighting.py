"""Weights of a fit from the spectrum of what the filters meet."""

from __future__ import annotations

import torch

# Of the mean power: what is added to all, so that nothing weighs nothing.
_FLOOR = 1e-4


def spectral_factor(power: torch.Tensor, taps: int) -> torch.Tensor:
    """The minimum-phase response [C, taps] whose power spectrum is `power` [C, F], up to its cut after `taps`.

    `power` are means of |u|^2 at F = N / 2 + 1 frequencies from 0 to pi. An error convolved with the response has the
    norm that the error's output has on such inputs. The response is scaled to a mean power of 1. By the cepstrum:
    its causal half has the logarithm of the spectrum as its real part (Oppenheim and Schafer).
    """
    power = power.to(torch.float64)
    mean = power.mean(dim=-1, keepdim=True)
    level = torch.where(mean > 0, power / mean.clamp_min(1e-300), 1.0) + _FLOOR
    period = 2 * (power.shape[-1] - 1)
    cepstrum = torch.fft.irfft(level.log().to(torch.complex128) / 2, period)
    fold = torch.zeros(period, dtype=torch.float64, device=power.device)
    fold[1 : period // 2] = 2.0
    fold[0] = fold[period // 2] = 1.0
    found: torch.Tensor = torch.fft.irfft(torch.fft.rfft(cepstrum * fold).exp(), period)
    return found[..., :taps]
