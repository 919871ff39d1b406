"""Hyena language models as transformers models: HyenaDNA, Hyena and MultiHyena, with their filters or distilled.

Names of tensors are those of the HyenaDNA checkpoints on the Hugging Face hub. `generate` keeps a cache; without one
every token goes through the convolutions again.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from rewright.passes.errors import InputError
from rewright.passes.models.hyena_config import HyenaConfig, HyenaDNAConfig, MultiHyenaConfig
from rewright.passes.models.hyena_filter import ImplicitFilter, ModalFilter, Modulation, Positions, Sine
from rewright.passes.models.hyena_mixer import HyenaMixer, Mixer, MultiHyenaMixer
from rewright.passes.models.hyena_state import HyenaLayer, layers_of

_log = logging.get_logger(__name__)

# Tokens of a long prompt that a recurrence reads at once.
PIECE = 1 << 12
# How the training code of HyenaDNA and safari spells names, some with a wrapper that saves memory.
_RENAMED = {
    r"^model\.backbone\.": "hyena.backbone.",
    r"^model\.lm_head\.": "lm_head.",
    r"\.(mixer|mlp)\.layer\.": r".\1.",
}
# The later names of the one tensor of frequencies that a filter's network has.
_ALIAS = re.compile(r"\.implicit_filter\.(?!1\.)\d+\.freq$")
# What this transformers calls the cache in what a model returns.
_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"


class _Perceptron(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(hidden), approximate="tanh"))
        return found


class _Block(nn.Module):
    """Norm, mixer, norm, perceptron; what is added up stays in float32."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        mixer = MultiHyenaMixer if isinstance(config, MultiHyenaConfig) else HyenaMixer
        self.mixer: Mixer = mixer(config, index)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.mlp = _Perceptron(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, layer: HyenaLayer | None) -> torch.Tensor:
        dtype = self.norm1.weight.dtype
        hidden = hidden + self.mixer(self.norm1(hidden.to(dtype)), mask, layer).float()
        found: torch.Tensor = hidden + self.mlp(self.norm2(hidden.to(dtype))).float()
        return found


class _Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)


class _Backbone(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList([_Block(config, index) for index in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)


class _Pretrained(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    base_model_prefix = "hyena"
    _no_split_modules = ("_Block",)
    _is_stateful = True
    _keep_in_fp32_modules_strict = ("filter_fn", "modal")
    # some files lack the features of positions, and there is one value that they can have
    _keys_to_ignore_on_load_missing = (r"filter_fn\.pos_emb\.[zt]$",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.modal is not None:
            # what a distilled checkpoint keeps for comparison
            self._keys_to_ignore_on_load_unexpected = [r"\.filter_fn\."]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **given: Any) -> Any:
        """As transformers does it, but what the file lacks is refused, not drawn at random. Raises InputError.

        A file may have the names of the training code, and a model that was read from one is saved with them.
        """
        given.setdefault("key_mapping", dict(_RENAMED))
        # or else the error does not name them
        given["ignore_mismatched_sizes"] = True
        model, facts = super().from_pretrained(*args, output_loading_info=True, **given)
        lacking = sorted({*map(str, facts["missing_keys"]), *(str(key[0]) for key in facts["mismatched_keys"])})
        if lacking:
            raise InputError(f"tensor `{lacking[0]}` is missing, or has another shape than `config.json` makes it")
        for name, module in model.named_modules():
            if isinstance(module, ModalFilter) and module.is_rounded():
                raise InputError(
                    f"the poles of `{name}` were rounded to 16 bits, and have lost their filters",
                    hint="write them in float32, or distil the model again with `rewright hyena-distill`",
                )
        return (model, facts) if output_loading_info else model

    def save_pretrained(self, *args: Any, state_dict: dict[str, torch.Tensor] | None = None, **given: Any) -> None:
        """As transformers does it; of the names that one tensor of frequencies has, the first is written."""
        tensors = self.state_dict() if state_dict is None else state_dict
        kept = {name: value for name, value in tensors.items() if not _ALIAS.search(name)}
        super().save_pretrained(*args, state_dict=kept, **given)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        spread = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, 0.0, spread)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            _uniform(module, module.kernel_size[0])
        elif isinstance(module, Positions | Modulation):
            module.compute()
        elif isinstance(module, Sine) and isinstance(module.freq, torch.Tensor):
            init.constant_(module.freq, module.frequency)
        elif isinstance(module, ImplicitFilter):
            init.normal_(module.bias)
            # frequencies are for weights of this size
            for layer in module.implicit_filter:
                if isinstance(layer, nn.Linear):
                    _uniform(layer, layer.in_features)
        elif isinstance(module, ModalFilter):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, Mixer):
            init.normal_(module.out_proj.weight, 0.0, spread / math.sqrt(2 * self.config.n_layer))
        elif isinstance(module, _Perceptron):
            init.normal_(module.fc2.weight, 0.0, spread / math.sqrt(2 * self.config.n_layer))


def _uniform(module: Any, reads: int) -> None:
    """Weights and bias as torch draws them."""
    bound = 1 / math.sqrt(reads)
    init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        init.uniform_(module.bias, -bound, bound)


class _Model(_Pretrained):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = _Backbone(config)
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


class _CausalLM(_Pretrained, GenerationMixin):  # type: ignore[misc]  # transformers is untyped here
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
