"""A causal language model with a learned prompt in front of whatever it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewright.formats.peft import Depth, Heads
from rewright.passes.models.running import cache_name, takes


class Front(nn.Module):
    """A learned prompt: `tensor` (tokens, width) in float32 holds embeddings, or with depth `all` keys and values.

    Those stand in every layer as if tokens had been read, as prefix tuning has them (Li and Liang 2021,
    arXiv:2101.00190).
    """

    tensor: torch.Tensor

    def __init__(self, tensor: torch.Tensor, depth: Depth = "input") -> None:
        super().__init__()
        self.depth = depth
        self.register_buffer("tensor", tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.tensor)

    def before(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """What a model reads for `tokens` (rows, length), the embeddings in front, in the model's dtype."""
        text: torch.Tensor = model.get_input_embeddings()(tokens)
        return torch.cat([self.tensor.to(text.dtype).expand(len(tokens), -1, -1), text], dim=1)

    def fill(self, model: Any, cache: Any, rows: int) -> None:
        """Put keys and values into an empty cache, for so many rows, in the model's dtype."""
        heads = Heads.of(model.config.to_dict())
        shape = (len(self), 2 * heads.layers, heads.count, heads.width)
        parts = self.tensor.to(model.dtype).view(shape).permute(1, 2, 0, 3)
        for layer in range(heads.layers):
            keys, values = (part.expand(rows, -1, -1, -1) for part in parts[2 * layer : 2 * layer + 2])
            cache.update(keys, values, layer)

    def standing(self, model: Any, rows: int) -> dict[str, Any]:
        """A cache that gives keys and values to whatever reads it, and keeps nothing of that."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        self.fill(model, cache, rows)
        for layer in cache.layers:
            layer.update = _Joined(layer)
        return {cache_name(model): cache, "use_cache": True}


class _Joined:
    """The update of a cache's layer that leaves it as it is."""

    def __init__(self, layer: Any) -> None:
        self.keys, self.values = layer.keys, layer.values

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


class Prompted(nn.Module):
    """A model that reads a prompt before every input, and is called as the model itself is.

    Logits are those of the input's own tokens. With a key-value cache the prompt is read when the cache is empty, and
    stands in it from then on. An attention mask (rows, tokens so far) is of the input alone; what it leaves out may
    stand to the left, between the prompt and a row's own tokens, whose positions follow on the prompt's all the same.
    """

    def __init__(self, model: Any, front: Front) -> None:
        super().__init__()
        self.inner, self.config, self.front = model, model.config, front.to(model.device)
        self._takes = takes(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inner.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.inner.dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.inner.get_input_embeddings()
        return table

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.inner.get_output_embeddings()
        return head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **given: Any) -> Any:
        """The model's own output; `given` goes to it as it is."""
        cache = given.get("cache", given.get("past_key_values"))
        rows, own = input_ids.shape
        reads = own
        if cache is None or cache.get_seq_length() == 0:
            if self.front.depth == "input":
                given["inputs_embeds"], reads = self.front.before(self.inner, input_ids), len(self.front) + own
            elif cache is not None:
                self.front.fill(self.inner, cache, rows)
            else:
                given |= self.front.standing(self.inner, rows)
        if attention_mask is not None:
            seen = torch.cat([attention_mask.new_ones(rows, len(self.front)), attention_mask], dim=1)
            given["attention_mask"] = seen
            if "position_ids" in self._takes:
                given["position_ids"] = (seen.long().cumsum(1) - 1).clamp_(min=0)[:, -reads:]
        if "inputs_embeds" not in given:
            return self.inner(input_ids=input_ids, **given)
        keeps = given.get("logits_to_keep") is None
        if keeps and "logits_to_keep" in self._takes:
            given["logits_to_keep"] = own
        output = self.inner(**given)
        if keeps:
            output.logits = output.logits[:, -own:]
        return output


def final_states(model: Any, front: Front | None, tokens: torch.Tensor) -> torch.Tensor:
    """What stands before the head for each of `tokens` (rows, length, width); gradients flow to the prompt."""
    given: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if front is not None and front.depth == "input":
        given = {"inputs_embeds": front.before(model, tokens), "use_cache": False}
    elif front is not None:
        given |= front.standing(model, len(tokens))
    states: torch.Tensor = model.base_model(**given).last_hidden_state
    return states[:, -tokens.shape[1] :]


def keys_and_values(model: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """What embeddings (tokens, width) leave in every layer when a model reads them: (tokens, numbers), float32."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        read = {cache_name(model): cache, "use_cache": True}
        model.base_model(inputs_embeds=embeddings.to(model.device, model.dtype)[None], **read)
    parts = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1).float().cpu()
