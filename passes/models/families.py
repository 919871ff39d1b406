"""The decoder families that the layer walk knows, as names on disk. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewright.passes.errors import InputError

# What transformers calls the tensors of all experts: gate and up in one, then down.
FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Experts:
    """Where a decoder layer keeps its experts.

    A running model holds them in two tensors below `module`, `gate_up_proj` and `down_proj`, with the experts in
    front; some files do too. Others have matrices `<stored>.<expert>.<part>.weight`, and `parts` are those three's
    names: gate, up and down, of which the first two stand one below the other in a running model. `parts` is empty
    where no file has them. `transposed`: the tensors are (experts, inputs, outputs), not (experts, outputs, inputs).
    """

    module: str
    stored: str
    parts: tuple[str, ...] = ()
    transposed: bool = False

    @staticmethod
    def count(config: Mapping[str, Any]) -> int:
        """The experts of a layer. Raises InputError where the config does not say."""
        found = config.get("num_experts", config.get("num_local_experts"))
        if not isinstance(found, int) or found < 1:
            raise InputError("`config.json` does not say how many experts a layer has")
        return found

    @property
    def fused(self) -> tuple[str, ...]:
        """The tensors that hold all experts' first matrices, and their second."""
        return tuple(f"{self.module}.{leaf}" for leaf in FUSED)

    def sources(self, fused: str, expert: int) -> tuple[str, ...]:
        """The modules of a layer whose matrices make up an expert's share of a fused tensor, from top to bottom."""
        parts = self.parts[:2] if fused == self.fused[0] else self.parts[2:]
        return tuple(f"{self.stored}.{expert}.{part}" for part in parts)

    def expert_of(self, local: str) -> int | None:
        """The expert that a separate matrix's module, named within its layer, belongs to; None for any other."""
        index, _, part = local.removeprefix(self.stored + ".").partition(".")
        known = local.startswith(self.stored + ".") and part in self.parts and index.isdecimal()
        return int(index) if known else None


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its parts.

    `base` is the prefix of the model without its head, which some files on the hub lack; `layers` the list of
    decoder layers; `embedding` and `head` the two tensors that may be tied, `ties` whether they are when the
    config does not say. `linears` are the matrices of a layer, not all of which every layer has, and `experts` those
    of its experts; a file may hold others, which no model builds. `writers` are those whose output is added to the
    residual stream as it is, in the order of a forward: none where a norm stands between.
    `renamed` pairs what a running model calls a part of a layer with what files call it.
    `fused_sets` are the matrices that servers join, and want alike.
    `matrix_class` is the class that transformers makes a matrix of: it cannot run one of its own packed.
    `transposed`: matrices are stored (inputs, outputs), as GPT-2's Conv1D has them.
    """

    base: str
    layers: str
    embedding: str
    linears: tuple[str, ...]
    writers: tuple[str, ...] = ()
    head: str = "lm_head.weight"
    ties: bool = False
    transposed: bool = False
    matrix_class: str = "Linear"
    experts: Experts | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    fused_sets: tuple[tuple[str, ...], ...] = ()

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether one tensor serves as embedding and head."""
        return bool(config.get("tie_word_embeddings", self.ties))

    def writes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """`writers`, but for models whose config adds them to something else than the stream."""
        normed = config.get("do_layer_norm_before") is False or config.get("apply_residual_connection_post_layernorm")
        return () if normed else self.writers

    def spellings(self, name: str) -> tuple[str, str]:
        """A name with the base prefix and without it: files on the hub have either."""
        bare = name.removeprefix(self.base)
        return self.base + bare, bare

    def stored_as(self, name: str) -> tuple[str, ...]:
        """The names under which files may have what a running model calls `name`."""
        others = [name.replace(f".{running}.", f".{stored}.") for running, stored in self.renamed]
        spelled = dict.fromkeys((name, *others))
        if name.startswith(self.base):
            spelled.update(dict.fromkeys(each for other in tuple(spelled) for each in self.spellings(other)))
        return tuple(spelled)

    def layer_of(self, stored: str) -> int | None:
        """The decoder layer that a stored tensor stands under, by its name."""
        for prefix in self.spellings(self.layers):
            if stored.startswith(prefix + "."):
                index = stored[len(prefix) + 1 :].split(".", 1)[0]
                return int(index) if index.isdecimal() else None
        return None

    def turns(self, fused: bool) -> bool:
        """Whether matrices are stored (inputs, outputs): those in the experts' `fused` tensors, or the others."""
        return self.experts is not None and self.experts.transposed if fused else self.transposed

    def experts_of(self, stored: str) -> Literal["one", "all"] | None:
        """Whether a stored tensor or module is of one of a layer's experts, or of all, by its name."""
        layer = self.layer_of(stored)
        if layer is None or self.experts is None:
            return None
        local = stored.split(f".{layer}.", 1)[1].removesuffix(".weight")
        if local in self.experts.fused:
            return "all"
        return None if self.experts.expert_of(local) is None else "one"

    def matrix_of(self, stored: str, config: Mapping[str, Any]) -> int | None:
        """The layer whose matrix a stored tensor is; None for anything that the model does not build as one.

        A tensor that holds all experts' matrices counts as one.
        """
        layer = self.layer_of(stored)
        depth = config.get("num_hidden_layers", config.get("n_layer"))
        if layer is None or (isinstance(depth, int) and layer >= depth):
            return None
        local = stored.split(f".{layer}.", 1)[1]
        module = local.removesuffix(".weight")
        if self._has_experts(layer, config):
            assert self.experts is not None
            if local in self.experts.fused:
                return layer
            expert = self.experts.expert_of(module)
            if expert is not None:
                return layer if module != local and expert < self.experts.count(config) else None
            if module.startswith("mlp."):
                return None
        return layer if module in self.linears and module != local else None

    def _has_experts(self, layer: int, config: Mapping[str, Any]) -> bool:
        step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
        return self.experts is not None and layer not in dense and (layer + 1) % step == 0


_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_GATED = (*_ATTENTION, *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
_LLAMA = Family(
    "model.",
    "model.layers",
    "model.embed_tokens.weight",
    _GATED,
    writers=("self_attn.o_proj", "mlp.down_proj"),
    fused_sets=(_ATTENTION[:3], ("mlp.gate_proj", "mlp.up_proj")),
)
_GEMMA = replace(_LLAMA, writers=(), ties=True)
_BLOOM = Family(
    "transformer.",
    "transformer.h",
    "transformer.word_embeddings.weight",
    ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    ties=True,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": replace(_LLAMA, experts=Experts("mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj"))),
    "mixtral": replace(
        _LLAMA,
        linears=_ATTENTION,
        writers=("self_attn.o_proj",),
        experts=Experts("mlp.experts", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        renamed=(("mlp", "block_sparse_moe"),),
        fused_sets=(_ATTENTION[:3],),
    ),
    "gpt_oss": replace(
        _LLAMA,
        linears=_ATTENTION,
        writers=("self_attn.o_proj",),
        experts=Experts("mlp.experts", "mlp.experts", transposed=True),
        fused_sets=(_ATTENTION[:3],),
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(
        _LLAMA,
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        fused_sets=(),
    ),
    "opt": Family(
        "model.",
        "model.decoder.layers",
        "model.decoder.embed_tokens.weight",
        (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2"),
        writers=("self_attn.out_proj", "fc2"),
        ties=True,
        fused_sets=(_ATTENTION[:3],),
    ),
    "gpt2": Family(
        "transformer.",
        "transformer.h",
        "transformer.wte.weight",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        writers=("attn.c_proj", "mlp.c_proj"),
        ties=True,
        transposed=True,
        matrix_class="Conv1D",
    ),
    "gpt_neox": Family(
        "gpt_neox.",
        "gpt_neox.layers",
        "gpt_neox.embed_in.weight",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        head="embed_out.weight",
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, matrix_class="FalconLinear"),
}


def family_of(config: Mapping[str, Any] | None) -> Family:
    """The family a config names. Raises InputError listing those known."""
    if config is None:
        raise InputError("no `config.json`", hint="a pass over layers needs the whole checkpoint directory")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model type `{model_type}` is not one whose layers are known", hint=known_types(config, FAMILIES)
        )
    return FAMILIES[model_type]


def known_types(config: Mapping[str, Any], known: Collection[str]) -> str:
    """The hint for a config of another type: those known, or that the type of its text model is."""
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if isinstance(inner, str) and inner in known:
        return f"its text model is a `{inner}`, which is known: make that a checkpoint of its own"
    return f"known: {listed(known)}"


def listed(words: Iterable[str]) -> str:
    """Words for a sentence, in order."""
    return ", ".join(f"`{word}`" for word in sorted(words))
