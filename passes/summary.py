"""What a checkpoint holds, from its headers and JSON files alone: no torch, no tensor read but packed shapes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewright.formats import dejavu
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.packing import parse
from rewright.formats.peft import Heads, attached, read_adapter
from rewright.formats.policy import read_policy
from rewright.formats.provenance import STAMP, read_stamp
from rewright.formats.strict import read_json
from rewright.formats.text_config import text_config
from rewright.passes.kinds import KINDS, LAYER_KINDS, kind_of
from rewright.passes.matrices import by_kind, packed_module, packed_weights, takes, to_count
from rewright.passes.models.families import FAMILIES

_TOKEN_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
# What stands beside a weight to decode it; its bytes count, its elements are no weights.
_BESIDE = re.compile(r"[._](scale|scale_inv|zero_point|shape|g_idx|absmax|scales|qzeros|global_scale)$")
# Tables that old code stored and model classes compute again.
_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias))$")
_OUTSIDE_LAYERS = re.compile(r"(^|\.)(final_layer_norm|norm|ln_f|embed_positions|wpe|project_in|project_out)\.\w+$")


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


# Zeros are counted unasked in what takes a second or two to read.
COUNTED = 2 * 10**9


def summary(path: Path, count: bool | None = False) -> dict[str, Any]:
    """Files, tensors, bytes, parameters and bits a weight by kind, vocabulary, quantisation, stages, warnings.

    `bits_per_weight` is all stored bits of a kind over its weights as a model sees them, scales included;
    `layer_bits_per_weight` the same over attention, mlp and experts. `matrices` are those of the layers by name,
    `takes` the bytes of codes, masks, scales and so on. With `count` the matrices' zeros are counted, which reads
    them; None counts those of small checkpoints. Raises FormatError for headers that cannot be read, InputError for
    packed matrices that cannot.
    """
    source = Checkpoint.open(path)
    warnings = list(source.warnings)
    config = source.config or {}
    kinds = _count(source)
    parameters = sum(counts["parameters"] for counts in kinds.values())
    layers = [kinds[kind] for kind in LAYER_KINDS if kind in kinds]
    embedding, tokenizer = _embedding_rows(source), _tokenizer_rows(source.root, warnings)
    stated = text_config(config).get("vocab_size")
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
        "matrices": by_kind(source, to_count(source) <= COUNTED if count is None else count),
        "takes": takes(source),
        "embedding_rows": embedding,
        "tokenizer_rows": tokenizer,
        "quantization": _quantization(source, warnings),
        "unknown": unknown(source),
        "prompt": _prompt(source),
        "predictors": _predictors(source, warnings),
        "policy": read_policy(source.root),
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
    module = packed_module(source, name)
    if module is not None:
        return packed_weights(source, module) if name.endswith((".weight_packed", ".weight_mask")) else 0
    return math.prod(source.entries[name].shape)


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
    """The stored scheme: its method, and how many matrices have which bits, group size, symmetry and kept weights."""
    stated = (source.config or {}).get("quantization_config")
    if not isinstance(stated, dict):
        return None
    schemes: Counter[tuple[int, int | None, bool, int | None]] = Counter()
    try:
        schemes.update(_schemes(source))
    except FormatError as error:
        warnings.append(error.message)
    keys = ("bits", "group_size", "symmetric", "nnz")
    return {
        "method": stated.get("quant_method"),
        "format": stated.get("format"),
        "schemes": [{**dict(zip(keys, key, strict=True)), "matrices": count} for key, count in schemes.most_common()],
    }


def _prompt(source: Checkpoint) -> dict[str, Any] | None:
    """The attached prompt: tokens, what it was learned on, bytes of keys and values that it takes in every request."""
    path = attached(source.root)
    if path is None:
        return None
    adapter = read_adapter(path)
    return {
        "tokens": adapter.tokens,
        "width": adapter.width,
        "learned": adapter.learned,
        "depth": adapter.depth,
        "cache_bytes_16_bit": 2 * adapter.tokens * Heads.of(source.config or {}).numbers,
    }


def _predictors(source: Checkpoint, warnings: list[str]) -> dict[str, Any] | None:
    """The attached predictors of sparsity: of what, how they were found, and the bytes that a token reads of them.

    Those that a model would not be loaded with, of other weights or damaged, are a warning.
    """
    try:
        found = dejavu.attached(source)
    except FormatError as error:
        warnings.append(error.message)
        return None
    if found is None:
        return None
    kept = {key: found.config.get(key) for key in ("targets", "method", "input", "share", "ranks")}
    return {**kept, "read_bytes": found.read_bytes}


def _schemes(source: Checkpoint) -> Iterator[tuple[int, int | None, bool, int | None]]:
    """Of each packed matrix: bits, group size, symmetry, and the weights that a group keeps where that is fixed."""
    packing = parse(source.config or {})
    for name in source.entries if packing is not None else ():
        module, _, leaf = name.rpartition(".")
        record = packing.of(module) if packing is not None and leaf == packing.mark else None
        if record is not None:
            yield record.bits, record.group_size, record.symmetric, record.nnz


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
