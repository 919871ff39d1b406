"""What travels with the weights, byte for byte, and what stays behind."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from rewright.formats.errors import FormatError, unreadable
from rewright.formats.shards import OTHERS, PICKLES
from rewright.formats.strict import printable

# Version control, download caches and byte code are no part of a model.
_SKIPPED = {".git", ".cache", ".huggingface", "__pycache__"}
# A second set of the same weights: other names, other precisions, other frameworks, training states.
_OTHER_SET = re.compile(
    r"(^|/)(consolidated[^/]*|original/.*|checkpoint-\d+/.*|[^/]*\.(fp16|fp32|bf16|fp8|non_ema)[.-][^/]*"
    r"|[^/]*\.(bin|safetensors|h5|msgpack|pth?)\.index(\.[^/.]+)?\.json)$"
)
_WEIGHT_SUFFIXES = (*PICKLES, *OTHERS, ".onnx_data", ".mlmodel", ".mlpackage", ".distcp")
# What changes what a model computes or how text becomes tokens; a README does not.
_MATTERS = (".json", ".jsonl", ".model", ".txt", ".jinja", ".tiktoken", ".spm", ".vocab", ".py", ".safetensors")
# Ours: a result has its own stamp and reports, never its source's.
_OURS = re.compile(r"^(rewright\.json$|reports/)")


def sort_files(root: Path, weights: Collection[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Split the files under `root`, the weight files in use aside, into those that travel and those left behind.

    Returns ([(POSIX path from `root`, file)], [what stays, a folder with a final slash]), both sorted. Links to
    files are followed later, when they are read; links to folders stay behind, they could lead anywhere.
    """
    used = {os.path.normpath(file) for file in weights}
    travel: list[tuple[str, Path]] = []
    stay: list[str] = []
    for folder, folders, files in os.walk(root, onerror=_refuse):
        inside = Path(folder).relative_to(root).as_posix() + "/"
        inside = "" if inside == "./" else inside
        for name in list(folders):
            relative = f"{inside}{name}"
            if name in _SKIPPED or _is_other_weights(f"{relative}/") or os.path.islink(Path(folder, name)):
                folders.remove(name)
                stay.append(f"{relative}/")
        for name in files:
            relative, file = f"{inside}{name}", Path(folder, name)
            _check_name(relative, root)
            if os.path.normpath(file) in used or _OURS.match(relative):
                continue
            if _is_other_weights(relative) or name in _SKIPPED or not (file.is_file() or file.is_symlink()):
                stay.append(relative)
            else:
                travel.append((relative, file))
    return sorted(travel), sorted(stay)


def matters(relative: str) -> bool:
    """Whether a sidecar is part of the model's meaning: configurations, tokenizers, templates, code, attachments."""
    return relative.endswith(_MATTERS) or relative.startswith("attachments/")


def _check_name(relative: str, root: Path) -> None:
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"`{root}` holds a file whose name is not UTF-8, {printable(repr(relative))}") from None


def _refuse(error: OSError) -> None:
    raise unreadable(error.filename, error)


def _is_other_weights(relative: str) -> bool:
    if relative.startswith("attachments/"):
        return False
    # Safetensors in a folder of their own belong to a part of the model (a dense head, an encoder) and travel.
    beside = "/" not in relative and relative.endswith(".safetensors")
    return beside or relative.endswith(_WEIGHT_SUFFIXES) or _OTHER_SET.search(relative) is not None
