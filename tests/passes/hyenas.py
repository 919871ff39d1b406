"""Small Hyena models of every kind, and what they should compute, written out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from rewright.passes.loading import register

Array = NDArray[np.float64]
SMALL = {"vocab_size": 21, "d_model": 12, "d_inner": 20, "n_layer": 2, "filter_order": 8, "max_seq_len": 48}
KINDS: dict[str, dict[str, Any]] = {
    "hyenadna": {"model_type": "hyenadna"},
    "hyena": {"model_type": "hyena", "emb_dim": 9, "tie_word_embeddings": True},
    "order 3": {"model_type": "hyena", "emb_dim": 5, "hyena_order": 3, "short_filter_order": 4},
    "multihyena": {"model_type": "multihyena", "emb_dim": 7, "num_heads": 4},
}
STATES = {"entries": [3, 2], "states": [6, 4], "fir_head": 0}


def small(kind: str, *, taps: int | None = None, seed: int = 0, **settings: Any) -> Any:
    """A random model in evaluation mode; with `taps` (0 and more) a distilled one, some poles of it near 1."""
    register()
    torch.manual_seed(seed)
    given: dict[str, Any] = {**SMALL, **KINDS[kind], **settings}
    if taps is not None:
        given["modal"] = {**STATES, "fir_head": taps}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("poles"):
                size = 1 - 10 ** -(0.3 + 2.2 * torch.rand(parameter.shape[:-1]))
                turn = 2 * math.pi * torch.rand(parameter.shape[:-1])
                parameter.copy_(torch.stack([size * turn.cos(), size * turn.sin()], dim=-1))
                # one that is real, and one that is not used
                parameter[0, 0, 1], parameter[1, 1] = 0.0, 0.0
            elif name.endswith((".residues", ".h0", ".fir")):
                parameter.normal_(0, 0.3)
                if name.endswith(".residues"):
                    parameter[1, 1] = 0.0
            elif "filter_fn" not in name and parameter.dim() > 1:
                # else signals are too faint for errors to show
                parameter.normal_(0, 0.3)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **given).logits
    return found


def in_parts(model: Any, ids: torch.Tensor, cuts: list[int], **given: Any) -> torch.Tensor:
    """Logits of a text that is read in parts, each going on from the cache."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        found.append(logits(model, ids[:, first:last], cache=cache, use_cache=True, **given))
    return torch.cat(found, dim=1)


def tensors(model: Any, prefix: str) -> dict[str, Array]:
    """Tensors below a prefix, in float64."""
    return {
        name.removeprefix(prefix): value.double().numpy()
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }


def implicit(held: dict[str, Array], length: int, shift: float) -> Array:
    """The filters of a layer by the formulas, the bias in h_0: (filters, length)."""
    values = held["pos_emb.z"][0, :length]
    last = max(int(name.split(".")[1]) for name in held if name.startswith("implicit_filter"))
    for place in range(0, last, 2):
        values = values @ held[f"implicit_filter.{place}.weight"].T + held[f"implicit_filter.{place}.bias"]
        values = np.sin(held["implicit_filter.1.freq"] * values)
    values = values @ held[f"implicit_filter.{last}.weight"].T
    values = values * (np.exp(-held["pos_emb.t"][0, :length] * np.abs(held["modulation.deltas"][0])) + shift)
    values[0] += held["bias"]
    return values.T


def modal(held: dict[str, Array], length: int) -> Array:
    """The filters of a distilled layer, by powers: (filters, length)."""
    poles, residues = (held[name] @ [1, 1j] for name in ("poles", "residues"))
    taps = held.get("fir", np.zeros((len(poles), 0)))
    powers = poles[..., None] ** np.arange(length)
    waves = (residues[..., None] * powers).real.sum(1)
    return np.concatenate([held["h0"][:, None], taps, waves], axis=1)[:, :length]


def mixer(held: dict[str, Array], filters: Array, hidden: Array, heads: int | None) -> Array:
    """One row (length, width) through a mixer, by sums: of order 2 and more, or of heads."""
    length, width = hidden.shape
    projected = hidden @ held["in_proj.weight"].T + held["in_proj.bias"]
    weight = held["short_filter.weight"][:, 0]
    taps = weight.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, projected.shape[1])), projected])
    short = sum(padded[tap : tap + length] * weight[:, tap] for tap in range(taps)) + held["short_filter.bias"]
    parts = np.split(short, short.shape[1] // width, axis=1)
    if heads is None:
        *gates, value = parts
        stages = len(gates) - 1
        for stage, gate in enumerate(reversed(gates[1:])):
            value = _convolved(value * gate, filters[stage::stages])
        mixed = value * gates[0]
    else:
        query, key, value = (part.reshape(length, heads, -1) for part in parts)
        outer = key[:, :, :, None] * value[:, :, None, :]
        signals = outer.reshape(length, -1)
        each = np.repeat(filters, signals.shape[1] // heads, axis=0)
        made = _convolved(signals, each).reshape(outer.shape)
        mixed = np.einsum("tmij,tmj->tmi", made, query).reshape(length, width)
    out: Array = mixed @ held["out_proj.weight"].T + held["out_proj.bias"]
    return out


def _convolved(signals: Array, filters: Array) -> Array:
    length = len(signals)
    return np.stack(
        [np.convolve(signals[:, channel], filters[channel])[:length] for channel in range(signals.shape[1])], axis=1
    )
