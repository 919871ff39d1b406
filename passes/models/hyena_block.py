"""What Hyena models are made of: blocks of a mixer and a perceptron, between an embedding and a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewright.passes.models.hyena_config import MultiHyenaConfig
from rewright.passes.models.hyena_mixer import HyenaMixer, Mixer, MultiHyenaMixer
from rewright.passes.models.hyena_state import HyenaLayer


class Perceptron(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(hidden), approximate="tanh"))
        return found


class HyenaBlock(nn.Module):
    """Norm, mixer, norm, perceptron; what is added up stays in float32."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        mixer = MultiHyenaMixer if isinstance(config, MultiHyenaConfig) else HyenaMixer
        self.mixer: Mixer = mixer(config, index)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.mlp = Perceptron(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, layer: HyenaLayer | None) -> torch.Tensor:
        dtype = self.norm1.weight.dtype
        hidden = hidden + self.mixer(self.norm1(hidden.to(dtype)), mask, layer).float()
        found: torch.Tensor = hidden + self.mlp(self.norm2(hidden.to(dtype))).float()
        return found


class Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)


class Backbone(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList([HyenaBlock(config, index) for index in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
