"""What the tests read: files of any header, a few tensors, the layouts people have on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.layout import TensorSpec

CONFIG = '{\n  "model_type": "llama",\n  "rope_theta": 500000.0,\n  "odd": [1, 1e-05],\n  "hidden_size": 4\n}\n'


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, right or wrong; `length` overrides the length field."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensors() -> dict[str, torch.Tensor]:
    """A few tensors of several dtypes, one empty, one without axes."""
    return {
        "model.embed_tokens.weight": torch.arange(32, dtype=torch.bfloat16).reshape(8, 4),
        "model.norm.weight": torch.linspace(-1, 1, 4),
        "counts": torch.tensor([3, 1, 2], dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def snapshot(folder: Path, cache: Path) -> Path:
    """`folder` laid out as the Hugging Face cache has it: a snapshot of links into `blobs`."""
    place = cache / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = cache / "models--a--b" / "blobs"
    place.mkdir(parents=True)
    blobs.mkdir()
    for at, file in enumerate(sorted(folder.iterdir())):
        blob = blobs / f"{at:064x}"
        shutil.copyfile(file, blob)
        (place / file.name).symlink_to(Path("../../blobs") / blob.name)
    return place


def layout_of(ckpt: Checkpoint) -> list[TensorSpec]:
    """The tensors of a checkpoint, to be declared as they are."""
    return [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in ckpt.entries.values()]


def copied(src: Path, dst: Path, max_shard_bytes: int = 5 * 10**9) -> Draft:
    """A draft of everything in `src`, not sealed."""
    ckpt = Checkpoint.open(src)
    draft = Draft(dst)
    draft.declare(layout_of(ckpt), max_shard_bytes)
    for name in ckpt.entries:
        draft.copy(name, ckpt)
    draft.carry(ckpt)
    return draft
