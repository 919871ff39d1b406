"""Where a decoder layer can be read sparsely, by its family and activation. Standard library only.

A site is a tensor that one or more matrices are fed: `attn_in` goes into q, k and v, `attn_out` into o, `mlp_in` into
the first matrices of the MLP and `mlp_mid` into its last. Neurons stand at `mlp_mid`, groups of heads at `attn_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewright.formats.text_config import layers_of, text_config
from rewright.passes.errors import InputError, UsageError
from rewright.passes.models.families import family_of, listed

Site = Literal["attn_in", "attn_out", "mlp_in", "mlp_mid"]
Target = Literal["mlp", "heads", "inputs"]
SITES: tuple[Site, ...] = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
TARGETS: tuple[Target, ...] = ("mlp", "heads", "inputs")

# Activations that are zero below zero: a neuron that is off is read for nothing.
SPARSE = frozenset({"relu", "relu2"})
# Smooth ones that a gate multiplies.
SMOOTH = frozenset({"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "quick_gelu"})


@dataclass(frozen=True, slots=True)
class Places:
    """The matrices of a family's layers by what feeds them; `gate` is empty where the MLP has none."""

    attention: tuple[str, str, str]
    out: str
    gate: str
    up: str
    down: str
    activation: str


_LLAMA = Places(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "hidden_act",
)
PLACES: dict[str, Places] = {
    "opt": Places(_LLAMA.attention, "self_attn.out_proj", "", "fc1", "fc2", "activation_function"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(_LLAMA, activation="hidden_activation")),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as far as its sites go.

    `groups` are those of heads that share keys and values, each of `group_width` numbers at `attn_out`; `neurons` the
    width of the MLP; `gated` whether its activation multiplies another matrix's output.
    """

    layers: int
    width: int
    neurons: int
    heads: int
    groups: int
    head_width: int
    activation: str
    places: Places

    @property
    def gated(self) -> bool:
        return bool(self.places.gate)

    @property
    def sparse(self) -> bool:
        """Whether neurons are exactly off, so that they can be predicted."""
        return self.activation in SPARSE

    @property
    def group_width(self) -> int:
        return self.heads // self.groups * self.head_width

    def members(self, site: Site) -> tuple[str, ...]:
        """The matrices that a site feeds, named within a layer."""
        places = self.places
        return {
            "attn_in": places.attention,
            "attn_out": (places.out,),
            "mlp_in": tuple(name for name in (places.gate, places.up) if name),
            "mlp_mid": (places.down,),
        }[site]

    def columns(self, site: Site) -> int:
        """Numbers of a token at a site."""
        return {"attn_out": self.heads * self.head_width, "mlp_mid": self.neurons}.get(site, self.width)

    def rows(self, site: Site) -> int:
        """Outputs of all matrices that a site feeds: what one of its numbers is multiplied with."""
        kept = self.groups * self.head_width
        first = self.neurons * (2 if self.gated else 1)
        return {"attn_in": self.heads * self.head_width + 2 * kept, "mlp_in": first}.get(site, self.width)

    def covered(self, targets: tuple[Target, ...]) -> dict[str, list[Site]]:
        """What each target reads sparsely: sites of thresholds, those that neurons take, that of heads."""
        neurons: list[Site] = ["mlp_in", "mlp_mid"] if "mlp" in targets else []
        heads: list[Site] = ["attn_out"] if "heads" in targets else []
        rest: list[Site] = [site for site in SITES if site not in neurons and site not in heads]
        return {"mlp": neurons, "heads": heads, "inputs": rest if "inputs" in targets else []}

    def row_weights(self, neuron: bool) -> int:
        """Weights that one neuron, or one group of heads, is read with: of a group those of q and o."""
        if neuron:
            return self.width * (3 if self.gated else 2)
        return 2 * self.group_width * self.width


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config tells. Raises InputError by name for what has no sites that are known, or no zeros."""
    model_type = config.get("model_type")
    if model_type not in PLACES:
        family_of(config)
        raise InputError(
            f"`{model_type}` has no contextual sparsity that is known here",
            hint=f"known are {listed(PLACES)}",
        )
    places, text = PLACES[model_type], text_config(config)
    if model_type == "opt" and not config.get("do_layer_norm_before", True):
        raise InputError(
            "an OPT whose norms stand after its blocks (OPT-350M) is not taken",
            hint="its other sizes are, which have them before",
        )
    if model_type == "opt" and config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise InputError("an OPT with projected embeddings is not taken", hint="its other sizes are")
    default = {"opt": "relu", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}.get(model_type, "silu")
    said = text.get(places.activation) or (text.get("hidden_act") if model_type != "opt" else None) or default
    activation = str(said)
    if activation not in SPARSE | SMOOTH:
        raise InputError(
            f"the activation `{activation}` is not one whose zeros are known",
            hint=f"known are {listed(SPARSE)}, and behind a gate {listed(SMOOTH)}",
        )
    if not places.gate and activation not in SPARSE:
        raise InputError(
            f"an MLP of `{activation}` without a gate has no zeros to predict",
            hint="take a checkpoint that was trained with ReLU, or one with a gated MLP, and `--targets inputs`",
        )
    width, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    neurons = int(text["ffn_dim"] if model_type == "opt" else text["intermediate_size"])
    groups = int(text.get("num_key_value_heads") or heads)
    head_width = int(text.get("head_dim") or width // heads)
    return Shape(layers_of(config), width, neurons, heads, groups, head_width, activation, places)


def settle(shape: Shape, asked: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets of a run; by default neurons where they can be off, else inputs. Raises UsageError."""
    if not asked:
        return ("mlp",) if shape.sparse else ("inputs",)
    if "mlp" in asked and not shape.sparse:
        raise UsageError(
            f"neurons of `{shape.activation}` are never off, and predicting them loses more than it saves",
            hint="use `--targets inputs`, which thresholds what each matrix is fed",
        )
    return tuple(target for target in TARGETS if target in asked)
