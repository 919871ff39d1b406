"""A running model: what it keeps between tokens, what it holds and reads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def takes(model: Any) -> frozenset[str]:
    """The names of what a model's forward may be given; of one with a prompt in front, those of the model itself."""
    return frozenset(inspect.signature(getattr(model, "inner", model).forward).parameters)


def new_cache(model: Any) -> dict[str, Any]:
    """An empty key-value cache, under the name that this transformers wants it by."""
    from transformers import DynamicCache

    return {cache_name(model): DynamicCache(config=model.config)}


def cache_name(model: Any) -> str:
    """What this transformers calls the cache that a model's forward is given."""
    return "cache" if "cache" in takes(model) else "past_key_values"


def last_only(model: Any) -> dict[str, Any]:
    """What makes a model work out the logits of the last token alone, where this one can.

    As an index: of a slice, which keeps its strides, torch's product copies the whole head.
    """
    if "logits_to_keep" not in takes(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.device)}


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys, values and states in a cache."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what a model has from its file, packed as it runs; what is tied counts once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors(model)}.values())


def read_bytes(model: Any) -> int:
    """Bytes of weights that one token's forward reads: of a table one row, of experts those that a token goes to."""
    config = model.config.get_text_config()
    goes_to = getattr(config, "num_experts_per_tok", None)
    head = model.get_output_embeddings()
    whole = {id(tensor) for tensor in _tensors(head)}
    read: dict[int, int] = {}
    for module in model.modules():
        for tensor in _own(module):
            if isinstance(module, nn.Embedding) and id(tensor) not in whole:
                read[id(tensor)] = tensor[0].nbytes
            elif goes_to and tensor.dim() == 3 and isinstance(module.__dict__.get("num_experts"), int):
                read[id(tensor)] = tensor[0].nbytes * min(goes_to, len(tensor))
            else:
                read[id(tensor)] = tensor.nbytes
    return sum(read.values())


def _own(module: nn.Module) -> list[torch.Tensor]:
    kept = [buffer for leaf, buffer in module._buffers.items() if leaf not in module._non_persistent_buffers_set]
    return [tensor for tensor in (*module._parameters.values(), *kept) if tensor is not None]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in model.modules() for tensor in _own(module)]
