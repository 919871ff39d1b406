"""What each layer of a model keeps of a sequence, from its config and its tensors' shapes. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rewright.passes.errors import InputError
from rewright.passes.flexgen_policy_search.shape import Cache

Shapes = Mapping[str, tuple[int, ...]]
# Modules by which a layer is known to keep a state instead of keys and values.
_RECURRENT = re.compile(r"(^|\.)(linear_attn|mamba|mixer|ssm|conv|temporal_block|time_mix\w*|lightning_attn)\.")
# Models of long convolutions, which have no heads of attention.
HYENAS = ("hyena", "hyenadna", "multihyena")
_SLIDING = ("sliding_attention", "chunked_attention", "local_attention")
_FULL = ("full_attention", "attention", "global_attention", "hybrid")


def number(text: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that the config has. Raises InputError for what is no whole number above zero."""
    for key in keys:
        value = text.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"`config.json` says `{key}` {value}, which is no whole number above 0")
            return value
    return None


def heads_of(text: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Query heads, key heads and their width. Raises InputError for counts that do not divide."""
    heads = number(text, "num_attention_heads", "n_head") or 1
    kept = number(text, "num_key_value_heads") or heads
    if text.get("model_type") == "falcon" and not text.get("new_decoder_architecture"):
        kept = 1 if text.get("multi_query", True) else number(text, "num_kv_heads") or heads
    width = number(text, "head_dim")
    if width is None:
        if hidden % heads:
            raise InputError(
                f"`config.json` says {heads} heads, which do not divide `hidden_size` {hidden}, and no `head_dim`"
            )
        width = hidden // heads
    if heads % kept:
        raise InputError(f"`config.json` says {kept} key heads, which do not divide its {heads} heads")
    return heads, kept, width


def caches_of(text: Mapping[str, Any], hidden: int, layers: list[Shapes]) -> tuple[Cache, ...]:
    """A cache for each layer; `layers` are the shapes of its tensors by their names in it. Raises InputError."""
    if text.get("model_type") in HYENAS:
        return tuple(_hyena(text, hidden, at) for at in range(len(layers)))
    stated = text.get("layer_types")
    if stated is not None and (not isinstance(stated, list) or len(stated) != len(layers)):
        raise InputError(f"`config.json` does not give each of the {len(layers)} layers one of `layer_types`")
    found = []
    for at, shapes in enumerate(layers):
        kind = str(stated[at]) if stated else _kind(text, at)
        if _recurs(kind, shapes):
            found.append(_state(text, hidden, shapes))
        elif not any("attn" in name or "attention" in name or "qkv" in name for name in shapes):
            found.append(Cache("none"))
        else:
            found.append(_attention(text, hidden, kind))
    return tuple(found)


def _kind(text: Mapping[str, Any], layer: int) -> str:
    """What a layer's attention is where the config does not list it."""
    if number(text, "sliding_window") is None or text.get("use_sliding_window", True) is False:
        return "full_attention"
    pattern = number(text, "sliding_window_pattern") or (2 if text.get("model_type") == "gemma2" else None)
    if pattern is not None:
        return "sliding_attention" if (layer + 1) % pattern else "full_attention"
    past = text.get("max_window_layers") if text.get("use_sliding_window") else 0
    return "sliding_attention" if layer >= (past if isinstance(past, int) else 0) else "full_attention"


def _recurs(kind: str, shapes: Shapes) -> bool:
    if kind in _SLIDING or kind in _FULL:
        return not any("attn" in n or "attention" in n for n in shapes) and any(map(_RECURRENT.search, shapes))
    return any(map(_RECURRENT.search, shapes))


def _attention(text: Mapping[str, Any], hidden: int, kind: str) -> Cache:
    heads, kept, width = heads_of(text, hidden)
    window = number(text, "sliding_window", "attention_chunk_size") if kind in _SLIDING else None
    latent, rope = number(text, "kv_lora_rank"), text.get("qk_rope_head_dim")
    if latent is not None:
        # one latent row serves all heads: scores against it and its rotary part, then its weighted sum
        row = latent + int(rope or 0)
        return Cache("latent", row, window, 0, heads * row, heads * latent, 2 * heads * (row + latent))
    numbers, name = 2 * kept * width, "sliding" if window else "full"
    return Cache(name, numbers, window, 0, heads * width, heads * width, 4 * heads * width)


def _state(text: Mapping[str, Any], hidden: int, shapes: Shapes) -> Cache:
    """Bytes of a state: its recurrent part in 32 bits, the last inputs of its convolution in 16."""
    convolution = sum(
        math.prod(shape[:-1]) * max(0, shape[-1] - 1) * 2
        for name, shape in shapes.items()
        if name.endswith(("conv1d.weight", "conv.weight"))
    )
    heads = number(text, "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads")
    width = number(text, "linear_value_head_dim", "mamba_d_head", "mamba_head_dim")
    depth = number(text, "linear_key_head_dim", "mamba_d_state", "ssm_state_size", "state_size")
    inner = heads * width if heads and width else None
    if inner is None:
        decay = next((shape for name, shape in shapes.items() if name.endswith("A_log")), ())
        inner = decay[0] if len(decay) == 2 else 0
        depth = decay[1] if len(decay) == 2 else depth
    numbers = inner * (depth or 0)
    return Cache("state", 0, None, 4 * numbers + convolution, 0, 0, 0)


def _hyena(text: Mapping[str, Any], hidden: int, layer: int) -> Cache:
    """The recurrences of a distilled Hyena layer, or all inputs of its convolutions so far."""
    order = number(text, "hyena_order") or 2
    taps = (order + 1) * hidden * ((number(text, "short_filter_order") or 3) - 1) * 4
    width = hidden * (order - 1)
    if text.get("model_type") == "multihyena":
        # a head convolves the products of all its keys and values
        width = hidden * hidden // (number(text, "num_heads") or 8)
    modal = text.get("modal")
    if not isinstance(modal, Mapping):
        return Cache("convolution", width, None, taps, width, width, 2 * width)
    states = modal.get("states")
    real = states[layer] if isinstance(states, list) and layer < len(states) else states
    if isinstance(real, bool) or not isinstance(real, int) or real < 1:
        raise InputError("`config.json` does not say how many `states` the recurrences of a layer have")
    return Cache("state", 0, None, taps + 4 * width * real, 0, 0, 0)
