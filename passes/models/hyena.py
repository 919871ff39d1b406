"""Hyena language models as transformers models: HyenaDNA, Hyena and MultiHyena, with their filters or distilled.

Names of tensors are those of the HyenaDNA checkpoints on the Hugging Face hub. `generate` keeps a cache; without one
every token goes through the convolutions again.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from rewright.passes.models.hyena_base import HyenaPreTrainedModel
from rewright.passes.models.hyena_block import Backbone
from rewright.passes.models.hyena_config import HyenaConfig, HyenaDNAConfig, MultiHyenaConfig
from rewright.passes.models.hyena_state import layers_of

_log = logging.get_logger(__name__)

# Tokens of a long prompt that a recurrence reads at once.
PIECE = 1 << 12
# What this transformers calls the cache in what a model returns.
_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"


class _Model(HyenaPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Final states of tokens (rows, length), which follow what the cache has read.

        The mask is (rows, length), or (rows, all tokens so far), and 0 where there is no token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`")
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        layers = [None] * self.config.n_layer if cache is None else layers_of(cache, self.config.n_layer)
        length = hidden.shape[1]
        self._warn(length + (0 if layers[0] is None else layers[0].seen))
        mask = None if attention_mask is None else attention_mask[:, -length:]
        hidden = self.backbone.dropout(hidden).float()
        states = [hidden]
        for block, layer in zip(self.backbone.layers, layers, strict=True):
            hidden = block(hidden, mask, layer)
            states.append(hidden)
        hidden = self.backbone.ln_f(hidden.to(self.backbone.ln_f.weight.dtype))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        found = BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=(*states[:-1], hidden) if wanted else None, **{_CACHE: cache}
        )
        return found.to_tuple() if return_dict is False else found

    def _warn(self, length: int) -> None:
        if self.config.modal is not None and length > self.config.max_seq_len:
            _log.warning_once(
                f"the text is longer than the {self.config.max_seq_len} tokens that the filters were distilled for: "
                "the recurrence goes on, and nothing says how well"
            )


class _CausalLM(HyenaPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped here
    _tied_weights_keys = {"lm_head.weight": "hyena.backbone.embeddings.word_embeddings.weight"}  # noqa: RUF012
    _model: type[_Model]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.hyena = self._model(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.hyena.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.hyena.set_input_embeddings(value)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does it; a token that was just made is never padding, and needs no mask."""
        # by the name of `kwargs` transformers knows that what the forward takes may be given
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        read = inputs.get("input_ids")
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration") and read is not None and read.shape[1] == 1:
            inputs["attention_mask"] = None
        return inputs

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **given: Any,
    ) -> Any:
        """Logits (rows, length or those to keep, rows of the embedding) in float32, and the loss of `labels`.

        A long prompt of which only the last logits are wanted goes into a recurrence in pieces: the memory that takes
        does not grow with it.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and input_ids is not None and not torch.is_grad_enabled():
            input_ids = self._read_ahead(input_ids, attention_mask, cache, logits_to_keep)
        read = self.hyena(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(read.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **given)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=read.hidden_states, **{_CACHE: read.get(_CACHE)}
        )
        return found.to_tuple() if return_dict is False else found

    def _read_ahead(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, kept: int | torch.Tensor
    ) -> torch.Tensor:
        """Have the cache read a long text but for its end, which is returned."""
        if self.config.modal is None or ids.shape[1] <= PIECE:
            return ids
        last = kept if isinstance(kept, int) else int(kept.tolist() == [-1])
        while last and ids.shape[1] > max(last, PIECE):
            seen = None if mask is None else mask[:, : mask.shape[1] - ids.shape[1] + PIECE]
            self.hyena(input_ids=ids[:, :PIECE], attention_mask=seen, cache=cache, use_cache=True)
            ids = ids[:, PIECE:]
        return ids


class HyenaDNAModel(_Model):
    """HyenaDNA without its head."""

    config_class = HyenaDNAConfig


class HyenaDNAForCausalLM(_CausalLM):
    """HyenaDNA (arXiv:2306.15794)."""

    config_class = HyenaDNAConfig
    _model = HyenaDNAModel


class HyenaModel(_Model):
    """Hyena without its head."""

    config_class = HyenaConfig


class HyenaForCausalLM(_CausalLM):
    """Hyena as a language model (arXiv:2302.10866)."""

    config_class = HyenaConfig
    _model = HyenaModel


class MultiHyenaModel(_Model):
    """MultiHyena without its head."""

    config_class = MultiHyenaConfig


class MultiHyenaForCausalLM(_CausalLM):
    """MultiHyena (arXiv:2310.18780)."""

    config_class = MultiHyenaConfig
    _model = MultiHyenaModel


def register() -> None:
    """Enter the models into transformers' Auto classes. Safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for config, model, causal in (
        (HyenaDNAConfig, HyenaDNAModel, HyenaDNAForCausalLM),
        (HyenaConfig, HyenaModel, HyenaForCausalLM),
        (MultiHyenaConfig, MultiHyenaModel, MultiHyenaForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
