"""A causal language model with a learned prompt in front of whatever it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewright.passes.models.running import takes


class Prompted(nn.Module):
    """A model that reads `embeddings` (tokens, width) before every input, and is called as the model itself is.

    Logits are those of the input's own tokens. With a key-value cache the prompt is read when the cache is empty, and
    stands in it from then on. An attention mask (rows, tokens so far) is of the input alone; what it leaves out may
    stand to the left, between the prompt and a row's own tokens, whose positions follow on the prompt's all the same.
    """

    embeddings: torch.Tensor

    def __init__(self, model: Any, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.register_buffer("embeddings", embeddings.to(model.device), persistent=False)
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
        begun = cache is not None and cache.get_seq_length() > 0
        if attention_mask is not None:
            seen = torch.cat([attention_mask.new_ones(len(input_ids), len(self.embeddings)), attention_mask], dim=1)
            given["attention_mask"] = seen
            if "position_ids" in self._takes:
                places = (seen.long().cumsum(1) - 1).clamp_(min=0)
                given["position_ids"] = places[:, -input_ids.shape[1] :] if begun else places
        if begun:
            return self.inner(input_ids=input_ids, **given)
        own = input_ids.shape[1]
        keeps = given.get("logits_to_keep") is None
        if keeps and "logits_to_keep" in self._takes:
            given["logits_to_keep"] = own
        output = self.inner(inputs_embeds=before(self.embeddings, self.inner, input_ids), **given)
        if keeps:
            output.logits = output.logits[:, -own:]
        return output


def before(embeddings: torch.Tensor | None, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a model reads for `tokens` (rows, length) with a prompt (tokens, width) in front, in the model's dtype."""
    text: torch.Tensor = model.get_input_embeddings()(tokens)
    if embeddings is None:
        return text
    return torch.cat([embeddings.to(text.dtype).expand(len(tokens), -1, -1), text], dim=1)


def final_states(model: Any, embeddings: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """What stands before the head for each of `tokens` (rows, length, width); gradients flow to the prompt."""
    output = model.base_model(inputs_embeds=before(embeddings, model, tokens), use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states[:, -tokens.shape[1] :]
