"""The long filters of Hyena models: the network that makes them, and the recurrence that replaces it.

Either gives its impulse responses, what the mixers convolve with, by `impulse`. Both stay in float32 or wider whatever
a model is cast to: a pole in bfloat16 has lost its filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from rewright.kernels.hyena_filter import hyena_filter
from rewright.kernels.vandermonde import vandermonde
from rewright.passes.errors import InputError

NARROW = (torch.bfloat16, torch.float16)
# So many poles may be numbers of 16 bits by themselves.
ROUND = 8


class Wide(nn.Module):
    """A module that moves with its model, and does not follow it into a dtype narrower than float32."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def widely(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            narrow = found.is_floating_point() and found.dtype.itemsize < 4
            return tensor.to(found.device) if narrow else found

        return super()._apply(widely, recurse)  # type: ignore[no-untyped-call]  # torch's


class Positions(nn.Module):
    """`z` (1, positions, features) is what the network reads of each position, `t` (1, positions, 1) its time."""

    z: torch.Tensor
    t: torch.Tensor

    def __init__(self, length: int, features: int) -> None:
        super().__init__()
        if features < 3 or features % 2 == 0:
            raise InputError(f"`emb_dim` is {features}, and must be odd and at least 3")
        self.register_buffer("z", torch.empty(1, length, features))
        self.register_buffer("t", torch.empty(1, length, 1))

    def compute(self) -> None:
        """Time from 0 to 1, then cosines and negative sines of it at evenly spread frequencies."""
        _, length, features = self.z.shape
        bands = (features - 1) // 2
        exact, device = torch.float64, self.z.device
        time = torch.linspace(0, 1, length, dtype=exact, device=device)[:, None]
        turns = torch.arange(length, dtype=exact, device=device)[:, None] * (2 * math.pi / length)
        turns = turns * torch.linspace(1e-4, bands - 1, bands, dtype=exact, device=device)
        init.copy_(self.t, time[None].to(self.t.dtype))
        init.copy_(self.z, torch.cat([time, turns.cos(), -turns.sin()], dim=1)[None].to(self.z.dtype))


class Sine(nn.Module):
    """sin(freq x), `freq` (1, width) learned or a constant."""

    freq: torch.Tensor | float

    def __init__(self, width: int, frequency: float, learned: bool) -> None:
        super().__init__()
        self.frequency = frequency
        self.freq = nn.Parameter(torch.empty(1, width)) if learned else frequency

    def rate(self, like: torch.Tensor) -> torch.Tensor:
        """The frequencies, a vector."""
        return self.freq[0] if isinstance(self.freq, torch.Tensor) else torch.full_like(like, self.freq)


class Modulation(nn.Module):
    """Each filter's decay: exp(-t |delta|) + shift."""

    deltas: torch.Tensor

    def __init__(self, filters: int, shift: float) -> None:
        super().__init__()
        self.shift = shift
        self.register_buffer("deltas", torch.empty(1, 1, filters))

    def compute(self) -> None:
        """The decays to a hundredth in 1.5 of the time to in 0.3 of it."""
        slow, fast = (math.log(0.01) / share for share in (1.5, 0.3))
        init.copy_(
            self.deltas, torch.linspace(slow, fast, self.deltas.shape[-1], device=self.deltas.device)[None, None]
        )


class ImplicitFilter(Wide):
    """Filters that a small network with sine activations makes of positions (Poli et al. 2023, arXiv:2302.10866)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, filters = config.filter_order, config.filters
        self.positions = config.max_seq_len
        self.bias = nn.Parameter(torch.empty(filters))
        self.pos_emb = Positions(config.max_seq_len, config.emb_dim)
        # one module, whose frequencies all layers of the network share
        sine = Sine(width, config.activation_freq, config.train_freq)
        layers: list[nn.Module] = [nn.Linear(config.emb_dim, width), sine]
        for _ in range(config.num_inner_mlps):
            layers += [nn.Linear(width, width), sine]
        self.implicit_filter = nn.Sequential(*layers, nn.Linear(width, filters, bias=False))
        self.modulation = Modulation(filters, config.modulation_shift)

    def impulse(self, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The first `length` samples of every filter, (filters, length), computed in `dtype`; the bias is in h_0.

        Raises InputError for more than there are positions.
        """
        if length > self.positions:
            raise InputError(
                f"{length} tokens are past the {self.positions} positions that the filters have",
                hint="give less text, or distil the filters into a recurrence with `rewright hyena-distill`",
            )
        times, deltas = self.pos_emb.t[0, :length, 0], self.modulation.deltas[0, 0]
        *sines, last = (layer for layer in self.implicit_filter if isinstance(layer, nn.Linear))
        sine = self.implicit_filter[1]
        assert isinstance(sine, Sine)
        frequency = sine.rate(sines[0].bias)
        features = self.pos_emb.z[0, :length].to(dtype)
        if torch.is_grad_enabled():
            values = features
            for layer in sines:
                values = layer.weight.to(dtype) @ values.T + layer.bias.to(dtype)[:, None]
                values = torch.sin(frequency.to(dtype)[:, None] * values).T
            window = torch.exp(-deltas.to(dtype).abs()[:, None] * times.to(dtype)) + self.modulation.shift
            found = last.weight.to(dtype) @ values.T * window
        else:
            weights, biases = [layer.weight for layer in (*sines, last)], [layer.bias for layer in sines]
            rates = [frequency] * len(sines)
            found = hyena_filter(features, times, weights, biases, rates, deltas, self.modulation.shift)
        return torch.cat([found[:, :1] + self.bias.to(dtype)[:, None], found[:, 1:]], dim=1)


def filled(module: ImplicitFilter, tensors: Mapping[str, torch.Tensor], name: str) -> ImplicitFilter:
    """The module with the tensors of a checkpoint, by their names within `<name>.filter_fn`.

    Of the frequencies one name is enough, since all layers share them; positions that are missing are computed. Raises
    InputError for any other that is missing, and for one of another shape.
    """
    shared = {leaf: value for leaf, value in tensors.items() if leaf.endswith(".freq")}
    if not {"pos_emb.z", "pos_emb.t"} <= tensors.keys():
        module.pos_emb.compute()
    for leaf, own in module.state_dict(keep_vars=True).items():
        value = tensors.get(leaf)
        if value is None and leaf.endswith(".freq") and shared:
            value = next(iter(shared.values()))
        if value is None and leaf.startswith("pos_emb."):
            continue
        if value is None:
            raise InputError(f"tensor `{name}.filter_fn.{leaf}` is missing")
        if value.shape != own.shape:
            raise InputError(
                f"tensor `{name}.filter_fn.{leaf}` has shape {list(value.shape)}, and `config.json` makes it "
                f"{list(own.shape)}"
            )
        own.data.copy_(value)
    return module


class ModalFilter(Wide):
    """Filters as sums of decaying waves: h_0 = `h0`, h_t = Re sum_k R_k p_k^(t-1) for t >= 1.

    `poles` and `residues` are (filters, entries, 2), real and imaginary parts. With a head of J taps, `fir` (filters,
    J) is h_1 ... h_J, and the sum h_t for t > J with the exponent t - 1 - J (Massaroli et al. 2023, arXiv:2310.18780).
    """

    def __init__(self, filters: int, entries: int, taps: int) -> None:
        super().__init__()
        self.poles = nn.Parameter(torch.empty(filters, entries, 2))
        self.residues = nn.Parameter(torch.empty(filters, entries, 2))
        self.h0 = nn.Parameter(torch.empty(filters))
        self.taps = taps
        if taps:
            self.fir = nn.Parameter(torch.empty(filters, taps))

    def is_rounded(self) -> bool:
        """Whether the poles hold no more than 16 bits, as those of a checkpoint that was cast do."""
        held = self.poles.detach()[self.poles.detach() != 0]
        # a few may be round numbers
        return len(held) > ROUND and any(torch.equal(held, held.to(dtype).to(held.dtype)) for dtype in NARROW)

    def logs(self) -> torch.Tensor:
        """(log|p|, arg p) of every pole, float64 (filters, entries, 2); of an unused one, (-inf, 0)."""
        real, imaginary = self.poles.double().unbind(-1)
        used = (real != 0) | (imaginary != 0)
        # no gradient flows through the logarithm of nothing
        real = torch.where(used, real, 1.0)
        decay = torch.where(used, torch.hypot(real, imaginary).log(), -math.inf)
        turn = torch.where(used, torch.atan2(imaginary, real), 0.0)
        return torch.stack([decay, turn], dim=-1)

    def impulse(self, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The first `length` samples of every filter, (filters, length), in `dtype`."""
        head = self.h0.to(dtype)[:, None]
        if self.taps:
            head = torch.cat([head, self.fir.to(dtype)], dim=1)
        rest = length - head.shape[1]
        if rest <= 0:
            return head[:, :length]
        return torch.cat([head, vandermonde(self.logs(), self.residues.to(dtype), rest)], dim=1)


def convolve(inputs: torch.Tensor, impulse: torch.Tensor) -> torch.Tensor:
    """The causal convolution of inputs (..., channels, length) with impulse responses (channels, length), length > 0.

    By transforms of twice the length, in the dtype of the responses.
    """
    length = inputs.shape[-1]
    spectrum = torch.fft.rfft(impulse, n=2 * length)
    found: torch.Tensor = torch.fft.irfft(
        torch.fft.rfft(inputs.to(impulse.dtype), n=2 * length) * spectrum, n=2 * length
    )
    return found[..., :length]
