"""A model from a checkpoint's headers: tensors become units to place, held against the config. Stdlib only."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rewright.formats import packing
from rewright.formats.dtypes import FLOATS, nbytes, stored_float
from rewright.formats.text_config import layers_of, positions_of, text_config
from rewright.passes.errors import InputError
from rewright.passes.flexgen_policy_search.caches import HYENAS, Shapes, caches_of, heads_of, number
from rewright.passes.flexgen_policy_search.shape import Kind, Model, Piece, Sparsity, Unit
from rewright.passes.flexgen_policy_search.sparse import Predicted, predicted
from rewright.passes.spec import Layout

_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block|layer))\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*\.?experts)\.(\d+)\.(.+)$")
_FUSED = re.compile(r"(^|\.)experts\.\w+$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight(_packed)?$")
# Parts of a model that read no text.
_OTHERS = re.compile(r"vision|visual|audio|image")
_EIGHT = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass
class _Module:
    """Tensors that are of use only together."""

    tensors: list[str] = field(default_factory=list)
    nbytes: int = 0
    numbers: int = 0
    plain: bool = True


def read(layout: Layout) -> Model:
    """The model of a checkpoint's headers. Raises InputError where config and headers contradict each other."""
    text = text_config(layout.config)
    hidden = number(text, "hidden_size", "n_embd", "d_model")
    if hidden is None:
        raise InputError("`config.json` does not say how wide the model is: there is no `hidden_size`")
    inside, outside = _split(layout)
    depth = layers_of(text)
    if not depth:
        raise InputError("`config.json` does not say how many layers the model has: there is no `num_hidden_layers`")
    if len(set(inside) & set(range(depth))) != depth:
        missing = next(at for at in range(depth) if at not in inside)
        raise InputError(
            f"`config.json` says {depth} layers, and there is no tensor of layer {missing}",
            hint="is a shard of the download absent?",
        )
    shapes: list[Shapes] = [
        {local: layout.tensors[name][1] for local, name in inside[at].items()} for at in range(depth)
    ]
    _check(text, hidden, shapes, layout)
    idle = [name for at, names in inside.items() if at >= depth for name in names.values()]
    experts = number(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    sparse, told = predicted(layout)
    reader = _Reader(layout, experts or 0, sparse.modules if sparse else frozenset())
    for at in range(depth):
        reader.layer(at, inside[at])
    reader.rest(outside, idle, hidden)
    caches = caches_of(text, hidden, shapes)
    units = reader.units()
    names = {unit.kind for unit in units}
    if "embedding" not in names:
        raise InputError("no tensor is known for the token embedding", hint="is a shard of the download absent?")
    reused = number(text, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k") or 1
    size = {name: nbytes(*layout.tensors[name]) for name in layout.tensors}
    rows = next(unit for unit in units if unit.kind == "embedding")
    heads, kept, _ = (1, 1, 0) if text.get("model_type") in HYENAS else heads_of(text, hidden)
    return Model(
        arch=str(text.get("model_type", "")),
        dtype=stored_float(layout.tensors),
        digest=_digest(layout),
        hidden=hidden,
        vocabulary=layout.tensors[rows.pieces[0].tensors[0]][1][0],
        ffn=max(reader.widest, number(text, "intermediate_size", "ffn_dim", "n_inner") or 0),
        query=max((cache.query for cache in caches), default=0),
        positions=positions_of(text) or number(text, "max_seq_len"),
        tied="head" not in names,
        experts=experts or 0 if any(unit.kind == "expert" for unit in units) else 0,
        reused=reused,
        caches=caches,
        units=units,
        fixed=tuple(reader.fixed),
        fixed_bytes=sum(size[name] for name in reader.fixed),
        idle=tuple(idle),
        idle_bytes=sum(size[name] for name in idle),
        total_bytes=sum(size.values()),
        heads=heads,
        gated=kept == heads and reader.gated,
        sparsity=_sparsity(sparse, units),
        notes=tuple(reader.notes + told + ([f"{len(idle)} tensors are of no layer that runs"] if idle else [])),
    )


def _sparsity(found: Predicted | None, units: Iterable[Unit]) -> Sparsity | None:
    """The same with the predictors' bytes counted."""
    if found is None:
        return None
    whole = sum(unit.nbytes * unit.count for unit in units if unit.sparse)
    return Sparsity(found.share, found.rows, round(found.predictors * whole)) if whole else None


def layers_list(layout: Layout) -> str:
    """The name of the list of decoder layers: the commonest list of modules; empty where there is none."""
    found = (_LAYER.match(name) for name in layout.tensors)
    lists = Counter(m[1] for m in found if m and not _OTHERS.search(m[1]))
    return lists.most_common(1)[0][0] if lists else ""


def _split(layout: Layout) -> tuple[dict[int, dict[str, str]], list[str]]:
    """Tensors by layer, under their names in it, and those outside."""
    found = {name: _LAYER.match(name) for name in layout.tensors}
    prefix = layers_list(layout)
    inside: dict[int, dict[str, str]] = {}
    outside = []
    for name, match in found.items():
        if match and match[1] == prefix:
            inside.setdefault(int(match[2]), {})[match[3]] = name
        else:
            outside.append(name)
    return inside, outside


def _check(text: Mapping[str, Any], hidden: int, layers: Iterable[Shapes], layout: Layout) -> None:
    """Hold widths and heads of the config against the shapes of embedding and attention."""
    for name, (_, shape) in layout.tensors.items():
        if _EMBEDDING.search(name) and len(shape) == 2:
            wide = number(text, "word_embed_proj_dim", "embedding_size") or hidden
            if shape[1] != wide:
                raise InputError(f"`config.json` says `hidden_size` {wide}, and `{name}` is {shape[1]} wide")
            rows = number(text, "vocab_size")
            if rows is not None and shape[0] < rows:
                raise InputError(f"`config.json` says `vocab_size` {rows}, and `{name}` has {shape[0]} rows")
    if text.get("kv_lora_rank") is not None or text.get("model_type") in HYENAS:
        return
    heads, kept, width = heads_of(text, hidden)
    for at, shapes in enumerate(layers):
        for part, count in (("q", heads), ("k", kept), ("v", kept)):
            rows_of = shapes.get(f"self_attn.{part}_proj.weight", ())
            # a gate may stand below the queries
            if rows_of and rows_of[0] not in (count * width, 2 * count * width if part == "q" else 0):
                raise InputError(
                    f"`config.json` says {count} heads of {width} for `{part}`, and layer {at} has"
                    f" `self_attn.{part}_proj` of {rows_of[0]} rows, not {count * width}"
                )


class _Reader:
    """Gathers tensors into modules, and modules of one size into units."""

    def __init__(self, layout: Layout, experts: int, sparse: frozenset[str]) -> None:
        self._layout, self._experts, self._sparse = layout, experts, sparse
        self._stated = packing.parse(layout.config)
        self._units: dict[tuple[Kind, str, int, int, bool, bool], list[Piece]] = {}
        self.fixed: list[str] = []
        self.notes: list[str] = []
        self.widest, self.gated = 0, True

    def layer(self, at: int, names: Mapping[str, str]) -> None:
        """Take over a layer's tensors."""
        modules: dict[tuple[str, int | None], _Module] = {}
        for local, name in names.items():
            expert = _EXPERT.match(local)
            if expert and self._experts:
                self._add(modules.setdefault((expert[1], int(expert[2])), _Module()), name)
            elif _FUSED.search(local) and self._experts and self._layout.tensors[name][1][:1] == (self._experts,):
                self._add(modules.setdefault((local.rpartition(".")[0], -1), _Module()), name)
            else:
                self._add(modules.setdefault((local.rpartition(".")[0] or local, None), _Module()), name)
        for (role, expert_index), module in modules.items():
            if expert_index == -1:
                self._slices(at, role, module)
            elif module.numbers:
                kind: Kind = "dense" if expert_index is None else "expert"
                self._put(kind, role, module, Piece(at, tuple(module.tensors)))
            else:
                self.fixed += module.tensors

    def rest(self, names: Iterable[str], idle: list[str], hidden: int) -> None:
        """Take over what stands outside the layers: embedding, head, norms; other models' parts are idle."""
        for name in names:
            shape = self._layout.tensors[name][1]
            module = _Module()
            self._add(module, name)
            if _EMBEDDING.search(name):
                self._put("embedding", "embedding", module, Piece(-1, (name,)))
            elif _HEAD.search(name):
                self._put("head", "head", module, Piece(-1, (name,)))
            elif _LAYER.match(name):
                idle.append(name)
            else:
                # norms, positions, projections beside the embedding: small, and read at every token
                self.fixed.append(name)
                if math.prod(shape) > 2**26:
                    self.notes.append(f"`{name}` is taken to stay on the GPU")
        for kind in ("embedding", "head"):
            if sum(key[0] == kind for key in self._units) > 1:
                raise InputError(f"there are several tensors that could be the {kind}")

    def units(self) -> tuple[Unit, ...]:
        """All classes, in order of their kinds, large ones first."""
        order = {"dense": 0, "head": 1, "expert": 2, "embedding": 3}
        keys = sorted(self._units, key=lambda key: (order[key[0]], -key[2], key[1], key[5]))
        return tuple(Unit(*key[:5], tuple(self._units[key]), sparse=key[5]) for key in keys)

    def _slices(self, at: int, role: str, module: _Module) -> None:
        """The experts that share tensors, one by one."""
        each = _Module(module.tensors, module.nbytes // self._experts, module.numbers // self._experts, module.plain)
        for expert in range(self._experts):
            self._put("expert", role, each, Piece(at, tuple(module.tensors), (expert, expert + 1)))

    def _put(self, kind: Kind, role: str, module: _Module, piece: Piece) -> None:
        # modules of one size are one class, whatever they are called
        word = kind if kind in ("dense", "expert") else role
        key = (kind, word, module.nbytes, module.numbers, module.plain, kind == "dense" and role in self._sparse)
        self._units.setdefault(key, []).append(piece)

    def _add(self, module: _Module, name: str) -> None:
        dtype, shape = self._layout.tensors[name]
        size = nbytes(dtype, shape)
        module.tensors.append(name)
        module.nbytes += size
        owner, _, leaf = name.rpartition(".")
        record = self._stated.of(owner) if self._stated is not None else None
        if record is not None and leaf in ("weight_packed", "weight_mask"):
            module.plain = False
            bits = 8 * 8 if leaf == "weight_mask" else 8 * 32 // record.bits
            module.numbers += math.prod(shape) * bits // 8
        elif len(shape) > 1 and not leaf.endswith(("scale", "scale_inv", "zero_point", "shape")):
            module.numbers += math.prod(shape)
            module.plain &= dtype in FLOATS or dtype in _EIGHT
            side = max(shape[-2:])
            if not _EMBEDDING.search(name) and not _HEAD.search(name):
                self.widest = max(self.widest, side)
            self.gated &= "gate_proj" not in owner


def _digest(layout: Layout) -> str:
    """sha256 of every tensor's name, dtype and shape, in the order of names."""
    rows = [[name, dtype, list(shape)] for name, (dtype, shape) in sorted(layout.tensors.items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
