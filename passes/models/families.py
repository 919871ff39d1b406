"""The decoder families that the layer walk knows, as names on disk. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewright.passes.errors import InputError


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its parts.

    `base` is the prefix of the model without its head, which some files on the hub lack; `layers` the list of
    decoder layers; `embedding` and `head` the two tensors that may be tied, `ties` whether they are when the
    config does not say. `linears` are the matrices of a layer; a file may hold others, which no model builds.
    `transposed`: matrices are stored (inputs, outputs), as GPT-2's Conv1D has them; plain transformers cannot run
    such a matrix packed.
    """

    base: str
    layers: str
    embedding: str
    linears: tuple[str, ...]
    head: str = "lm_head.weight"
    ties: bool = False
    transposed: bool = False

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether one tensor serves as embedding and head."""
        return bool(config.get("tie_word_embeddings", self.ties))

    def spellings(self, name: str) -> tuple[str, str]:
        """A name with the base prefix and without it: files on the hub have either."""
        bare = name.removeprefix(self.base)
        return self.base + bare, bare

    def layer_of(self, stored: str) -> int | None:
        """The decoder layer that a stored tensor stands under, by its name."""
        for prefix in self.spellings(self.layers):
            if stored.startswith(prefix + "."):
                index = stored[len(prefix) + 1 :].split(".", 1)[0]
                return int(index) if index.isdecimal() else None
        return None

    def matrix_of(self, stored: str, config: Mapping[str, Any]) -> int | None:
        """The layer whose matrix a stored tensor is; None for anything that the model does not build as one."""
        layer = self.layer_of(stored)
        depth = config.get("num_hidden_layers", config.get("n_layer"))
        if layer is None or (isinstance(depth, int) and layer >= depth):
            return None
        local = stored.split(f".{layer}.", 1)[1]
        return layer if local.removesuffix(".weight") in self.linears and local.endswith(".weight") else None


_GATED = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
)
_LLAMA = Family("model.", "model.layers", "model.embed_tokens.weight", _GATED)
_GEMMA = Family("model.", "model.layers", "model.embed_tokens.weight", _GATED, ties=True)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "opt": Family(
        "model.",
        "model.decoder.layers",
        "model.decoder.embed_tokens.weight",
        (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2"),
        ties=True,
    ),
    "gpt2": Family(
        "transformer.",
        "transformer.h",
        "transformer.wte.weight",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ties=True,
        transposed=True,
    ),
    "gpt_neox": Family(
        "gpt_neox.",
        "gpt_neox.layers",
        "gpt_neox.embed_in.weight",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        head="embed_out.weight",
    ),
}


def family_of(config: Mapping[str, Any] | None) -> Family:
    """The family a config names. Raises InputError listing those known."""
    if config is None:
        raise InputError("no `config.json`", hint="a pass over layers needs the whole checkpoint directory")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model type `{model_type}` is not one whose layers are known", hint=f"known: {listed(FAMILIES)}"
        )
    return FAMILIES[model_type]


def listed(words: Iterable[str]) -> str:
    """Words for a sentence, in order."""
    return ", ".join(f"`{word}`" for word in sorted(words))
