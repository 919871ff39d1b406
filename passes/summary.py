"""What a checkpoint holds, from its headers and JSON files alone: no torch, no tensor read but packed shapes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.provenance import STAMP, read_stamp
from rewright.formats.strict import read_json
from rewright.passes.models.families import FAMILIES

KINDS = ("embedding", "attention", "mlp", "experts", "norm", "head", "other")
# Those whose matrices decoder layers consist of.
LAYER_KINDS = ("attention", "mlp", "experts")

# The first that matches a name decides: a norm inside attention is a norm.
_PATTERNS = (
    ("norm", re.compile(r"(^|[._])(norm\w*|\w*layer_?norm|ln_\w+|ln\d?)(\.|$)|_norm\.")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.")),
    ("embedding", re.compile(r"(^|\.)(embed_\w+|embeddings?|w[tp]e|tok_embeddings|word_embeddings)\.")),
    ("attention", re.compile(r"(^|[._])(\w*attn|\w*attention|[qkv]_proj)(\.|$)")),
    ("experts", re.compile(r"(^|\.)experts?(\.|$)")),
    ("mlp", re.compile(r"(^|[._])(mlp|ffn|feed_forward|\w*moe|fc\d?|gate_proj|up_proj|down_proj)(\.|$)")),
)
_TOKEN_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
# What stands beside a weight to decode it; its bytes count, its elements are no weights.
_BESIDE = re.compile(r"[._](scale|scale_inv|zero_point|shape|g_idx|absmax|scales|qzeros|global_scale)$")
# Tables that old code stored and model classes compute again.
_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias))$")
_OUTSIDE_LAYERS = re.compile(r"(^|\.)(final_layer_norm|norm|ln_f|embed_positions|wpe|project_in|project_out)\.\w+$")


def kind_of(name: str) -> str:
    """The part of a model that a tensor belongs to, by its name."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def stamp_of(path: Path) -> dict[str, Any] | None:
    """The stamp of a checkpoint folder, None where it has none. Raises FormatError for one that is damaged."""
    stamp = read_stamp(path) if path.is_dir() else None
    if stamp is None:
        return None
    stages = stamp.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise FormatError(f"`{path / STAMP}` is damaged: its `stages` are not a list of objects")
    if any(not isinstance(stage.get("seconds", 0), int | float | None) for stage in stages):
        raise FormatError(f"`{path / STAMP}` is damaged: a stage's `seconds` is not a number")
    return stamp


def summary(path: Path) -> dict[str, Any]:
    """Files, tensors, bytes, parameters and bits a weight by kind, vocabulary, quantisation, stages, warnings.

    `bits_per_weight` is all stored bits of a kind over its weights as a model sees them, scales included;
    `layer_bits_per_weight` the same over attention, mlp and experts. Raises FormatError for headers that cannot be
    read.
    """
    source = Checkpoint.open(path)
    warnings = list(source.warnings)
    config = source.config or {}
    kinds = _count(source)
    parameters = sum(counts["parameters"] for counts in kinds.values())
    layers = [kinds[kind] for kind in LAYER_KINDS if kind in kinds]
    embedding, tokenizer = _embedding_rows(source), _tokenizer_rows(source.root, warnings)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    stated = text.get("vocab_size") if isinstance(text, dict) else None
    if embedding is not None and isinstance(stated, int) and stated != embedding:
        warnings.append(f"config.json says `vocab_size` {stated}, the embedding has {embedding} rows")
    if embedding is not None and tokenizer is not None and tokenizer > embedding:
        warnings.append(f"the tokenizer has {tokenizer} tokens, the embedding only {embedding} rows")
    return {
        "path": str(path),
        "model_type": config.get("model_type"),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in source.files],
        "file_bytes": sum(file.stat().st_size for file in source.files),
        "tensors": len(source.entries),
        "tensor_bytes": source.total_bytes,
        "parameters": parameters,
        "bits_per_weight": _bits(source.total_bytes, parameters),
        "layer_bits_per_weight": _bits(sum(c["bytes"] for c in layers), sum(c["parameters"] for c in layers)),
        "dtypes": dict(Counter(entry.dtype for entry in source.entries.values())),
        "kinds": kinds,
        "embedding_rows": embedding,
        "tokenizer_rows": tokenizer,
        "quantization": _quantization(source, warnings),
        "unknown": unknown(source),
        "stages": (stamp_of(path) or {}).get("stages", []),
        "sidecars": [name for name, _ in source.sidecars()],
        "left_behind": source.left_behind(),
        "warnings": warnings,
    }


def _bits(stored: int, parameters: int) -> float | None:
    return 8 * stored / parameters if parameters else None


def _count(source: Checkpoint) -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {kind: {"tensors": 0, "parameters": 0, "bytes": 0} for kind in KINDS}
    for name, entry in source.entries.items():
        counts = kinds[kind_of(name)]
        counts["tensors"] += 1
        counts["bytes"] += entry.nbytes
        counts["parameters"] += _weights_in(source, name)
    for counts in kinds.values():
        counts["bits_per_weight"] = _bits(counts["bytes"], counts["parameters"])
    return {kind: counts for kind, counts in kinds.items() if counts["tensors"]}


def _weights_in(source: Checkpoint, name: str) -> int:
    """How many weights a stored tensor stands for."""
    if _BESIDE.search(name):
        return 0
    if name.endswith(".weight_packed"):
        shape = packed_shape(source, name.removesuffix(".weight_packed"))
        if shape is not None:
            return math.prod(shape)
    return math.prod(source.entries[name].shape)


def packed_shape(source: Checkpoint, module: str) -> tuple[int, ...] | None:
    """The shape a packed matrix has when decoded, from its `weight_shape`; None where that is not stored."""
    entry = source.entries.get(f"{module}.weight_shape")
    if entry is None or entry.dtype not in ("I64", "I32") or entry.nbytes > 64:
        return None
    data, width = b"".join(source.chunks(entry.name)), 8 if entry.dtype == "I64" else 4
    return tuple(int.from_bytes(data[i : i + width], "little", signed=True) for i in range(0, len(data), width))


def _embedding_rows(source: Checkpoint) -> int | None:
    for pattern in (_TOKEN_EMBEDDING, re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")):
        for name, entry in source.entries.items():
            if pattern.search(name) and len(entry.shape) == 2:
                return entry.shape[0]
    return None


def _tokenizer_rows(root: Path, warnings: list[str]) -> int | None:
    """The highest token id plus one, from the tokenizer's JSON; None where there is none to read."""
    try:
        ids = list(_token_ids(root))
    except FormatError as error:
        warnings.append(error.message)
        return None
    return max(ids) + 1 if ids else None


def _token_ids(root: Path) -> Iterator[int]:
    whole = _object(root / "tokenizer.json")
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else _object(root / "vocab.json")
    if isinstance(vocabulary, dict):
        yield from (number for number in vocabulary.values() if isinstance(number, int))
    elif isinstance(vocabulary, list) and vocabulary:
        yield len(vocabulary) - 1
    for added in whole.get("added_tokens") or ():
        if isinstance(added, dict) and isinstance(added.get("id"), int):
            yield added["id"]
    yield from (number for number in _object(root / "added_tokens.json").values() if isinstance(number, int))


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _quantization(source: Checkpoint, warnings: list[str]) -> dict[str, Any] | None:
    """The stored scheme: its method, and how many matrices have which bits, group size and symmetry."""
    from rewright.formats.compressed_tensors import parse

    stated = (source.config or {}).get("quantization_config")
    if not isinstance(stated, dict):
        return None
    schemes: Counter[tuple[int, int | None, bool]] = Counter()
    try:
        read = parse(source.config or {})
        for name in source.entries:
            scheme = read.scheme_of(name.removesuffix(".weight_packed")) if read and "_packed" in name else None
            if scheme is not None:
                schemes[scheme.bits, scheme.group_size, scheme.symmetric] += 1
    except FormatError as error:
        warnings.append(error.message)
    return {
        "method": stated.get("quant_method"),
        "format": stated.get("format"),
        "schemes": [
            {"bits": bits, "group_size": group, "symmetric": symmetric, "matrices": count}
            for (bits, group, symmetric), count in schemes.most_common()
        ],
    }


def unknown(source: Checkpoint) -> list[str]:
    """Tensors that the family's model class does not build, as far as names tell: they travel, untouched.

    Of a family whose names are not known only the buffers that every class computes again are named.
    """
    family = FAMILIES.get(str((source.config or {}).get("model_type")))
    odd = []
    for name in source.entries:
        if _BUFFERS.search(name):
            odd.append(name)
        elif family is not None and family.layer_of(name) is None:
            known = {*family.spellings(family.embedding), family.head}
            if name not in known and not _OUTSIDE_LAYERS.search(name) and "." in name:
                odd.append(name)
    return odd
