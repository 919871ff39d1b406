"""How Hyena models are read, written and initialised, as transformers asks its models to be."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from rewright.passes.errors import InputError
from rewright.passes.models.hyena_block import Perceptron
from rewright.passes.models.hyena_filter import ImplicitFilter, ModalFilter, Modulation, Positions, Sine
from rewright.passes.models.hyena_mixer import Mixer

# How the training code of HyenaDNA and safari spells names, some with a wrapper that saves memory.
_RENAMED = {
    r"^model\.backbone\.": "hyena.backbone.",
    r"^model\.lm_head\.": "lm_head.",
    r"\.(mixer|mlp)\.layer\.": r".\1.",
}
# The later names of the one tensor of frequencies that a filter's network has.
_ALIAS = re.compile(r"\.implicit_filter\.(?!1\.)\d+\.freq$")


class HyenaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    base_model_prefix = "hyena"
    _no_split_modules = ("HyenaBlock",)
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
        elif isinstance(module, Perceptron):
            init.normal_(module.fc2.weight, 0.0, spread / math.sqrt(2 * self.config.n_layer))


def _uniform(module: Any, reads: int) -> None:
    """Weights and bias as torch draws them."""
    bound = 1 / math.sqrt(reads)
    init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        init.uniform_(module.bias, -bound, bound)
