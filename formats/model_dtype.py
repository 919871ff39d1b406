"""The dtype that a config.json says its model is computed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewright.formats.foreign import STATED

# `torch_dtype` until transformers 4.55, `dtype` since; readers take either.
KEYS = ("dtype", "torch_dtype")
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def dtype_changes(config: Mapping[str, Any], code: str | None, otherwise: str) -> dict[str, Any]:
    """The top-level keys that change so that `config`, and each part that says a dtype, says `code`; None: no other.

    Where the top level says none yet it gets one, of `code` or else `otherwise`: transformers would take that of the
    first tensor. An empty config stays so. Codes are those of safetensors; models are computed in 16, 32 or 64 bits.
    """
    if not config:
        return {}
    said = _renamed(config, _NAMES[code]) if code else dict(config)
    if not any(isinstance(said.get(key), str) for key in KEYS):
        said["dtype"] = _NAMES[code or otherwise]
    return {key: value for key, value in said.items() if value != config.get(key)}


def _renamed(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = dict(said)
    for key, value in said.items():
        if isinstance(value, Mapping) and key not in STATED:
            found[key] = _renamed(value, name)
        elif key in KEYS and isinstance(value, str):
            found[key] = name
    return found
