"""What a config says of the part of a model that reads text, whose own config some keep in `text_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: the whole one, or its `text_config`."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a model has; None where its config sets no limit."""
    text = text_config(config)
    found = text.get("max_position_embeddings") or text.get("n_positions")
    return found if isinstance(found, int) else None


def layers_of(config: Mapping[str, Any]) -> int:
    """The number of decoder layers; 0 where the config does not say."""
    text = text_config(config)
    return int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
