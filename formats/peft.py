"""A learned prompt as PEFT stores it: a folder with a config and one tensor. Standard library only.

Prompt tuning has embeddings, a row a token. Prefix tuning has keys and values for every layer: a row has, layer by
layer, the keys of all heads and then their values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.header import encode_header
from rewright.formats.layout import TensorSpec
from rewright.formats.strict import read_json
from rewright.formats.text_config import layers_of, text_config

# Where a checkpoint has its prompt.
FOLDER = "attachments/prompt"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The same tensor under a name of its own, for servers that take embeddings and not PEFT's folders.
EMBEDS = "prompt_embeds.safetensors"
TENSOR = "prompt_embeddings"

# Where a prompt stands: before the first layer as embeddings, or in all of them as keys and values.
Depth = Literal["input", "all"]
KINDS: dict[str, Depth] = {"PROMPT_TUNING": "input", "PREFIX_TUNING": "all"}


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model keeps of a token: keys and values of `count` heads of `width` numbers each, in every layer."""

    layers: int
    count: int
    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """As a checkpoint's config says."""
        text = text_config(config)
        heads, width = (
            int(text.get(new) or text.get(old) or 0)
            for new, old in (("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
        )
        kept = int(text.get("num_key_value_heads") or heads)
        # Falcon says it in its own words; the later design spreads what it shares over all heads before it keeps it
        if text.get("model_type") == "falcon" and not text.get("new_decoder_architecture"):
            kept = 1 if text.get("multi_query", True) else int(text.get("num_kv_heads") or heads)
        return cls(layers_of(config), kept, int(text.get("head_dim") or width // max(1, heads)))

    @property
    def numbers(self) -> int:
        """Keys and values of a token over all layers."""
        return 2 * self.layers * self.count * self.width


@dataclass(frozen=True, slots=True)
class Base:
    """What a prompt was learned on: the embedding's `width` and `rows`, and a sha256 of its values in bfloat16."""

    width: int
    rows: int
    checksum: str

    def told(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        return {"base_width": str(self.width), "base_rows": str(self.rows), "base_embedding": self.checksum}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Base | None:
        """What a file's metadata says; None where it says nothing, as in files that PEFT wrote."""
        width, rows = (metadata.get(f"base_{word}", "") for word in ("width", "rows"))
        checksum = metadata.get("base_embedding", "")
        if not (width.isdecimal() and rows.isdecimal() and checksum):
            return None
        return cls(int(width), int(rows), checksum)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A prompt's file: `source` has the tensor, `tokens` rows of `width` numbers."""

    source: Checkpoint
    depth: Depth
    tokens: int
    width: int
    base: Base | None

    @property
    def learned(self) -> str:
        """What it was learned on, in a few words; empty where the file does not say."""
        return self.source.metadata.get("learned", "")


def attached(root: Path) -> Path | None:
    """The file of the prompt that is attached to the checkpoint in a folder."""
    path = root / FOLDER / WEIGHTS
    return path if os.path.lexists(path) else None


def found_in(path: Path) -> Path:
    """The file of a prompt that a folder has: PEFT's, or the checkpoint that it is attached to; else the path.

    Raises FormatError for a folder that has none.
    """
    if not path.is_dir():
        return path
    for name in (f"{FOLDER}/{WEIGHTS}", WEIGHTS, EMBEDS):
        if os.path.lexists(path / name):
            return path / name
    raise FormatError(
        f"`{path}` has no prompt", hint=f"a checkpoint has it in `{FOLDER}/`, PEFT's folders as `{WEIGHTS}`"
    )


def read_adapter(path: Path) -> Adapter:
    """Read the headers of a prompt, its file or a folder with it. Raises FormatError for one that is none."""
    file = found_in(path)
    config = file.with_name(CONFIG)
    depth = _depth(config) if os.path.lexists(config) else "input"
    source = Checkpoint.open(file)
    entry = source.entries.get(TENSOR)
    if entry is None:
        raise FormatError(f"`{file}` has no tensor `{TENSOR}`", hint="it is no prompt of PEFT's PROMPT_TUNING")
    if len(entry.shape) != 2 or not all(entry.shape) or entry.dtype not in ("F32", "BF16", "F16"):
        raise FormatError(f"`{TENSOR}` in `{file}` is {entry.dtype} {list(entry.shape)}, not rows of floats")
    return Adapter(source, depth, *entry.shape, Base.read(source.metadata))


def _depth(path: Path) -> Depth:
    said = read_json(path)
    kind = said.get("peft_type") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"`{path}` is of type `{kind}`, not one of {', '.join(KINDS)}")
    return KINDS[kind]


def files(
    depth: Depth, tokens: int, width: int, data: bytes, base: Base, learned: str, model: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of `FOLDER`, from the float32 bytes of (tokens, width); `model` is a checkpoint's config.

    `learned` says in a few words what the prompt was learned on. No path of any machine is in them: PEFT is told where
    the base is by whoever loads it.
    """
    text = text_config(model)
    heads = Heads.of(model)
    config = {
        "base_model_name_or_path": "",
        "inference_mode": True,
        "num_attention_heads": text.get("num_attention_heads") or text.get("n_head"),
        "num_layers": heads.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": next(kind for kind, stands in KINDS.items() if stands == depth),
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    if depth == "all":
        config |= {
            "num_attention_heads": heads.count,
            "token_dim": heads.count * heads.width,
            "prefix_projection": False,
        }
    else:
        config["prompt_tuning_init"] = "RANDOM"
    head, _ = encode_header(
        [TensorSpec(TENSOR, "F32", (tokens, width))], {"format": "pt", **base.told(), "learned": learned}
    )
    made = {
        f"{FOLDER}/{CONFIG}": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        f"{FOLDER}/{WEIGHTS}": head + data,
    }
    if depth == "input":
        made[f"{FOLDER}/{EMBEDS}"] = head + data
    return made
