"""Which files hold a checkpoint's weights, and which tensor is in which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rewright.formats.errors import FormatError, unreadable
from rewright.formats.header import Header, check_name, read_header
from rewright.formats.strict import printable, read_json, regular_size

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHERS = (".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite")
_DANGER = "a pickle can run code when it is opened; in a sandbox, "
_PICKLE_HINT = f"{_DANGER}load it with transformers and call `model.save_pretrained(folder)`, which writes safetensors"
# of training, with more in it than weights
_CKPT_HINT = f'{_DANGER}load it with torch and write its `["state_dict"]` with `safetensors.torch.save_file`'


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files in index order, their headers, and where an index says to read each tensor.

    `owner` is None for a single file. `warnings` are lines a user should see once.
    """

    files: tuple[Path, ...]
    owner: dict[str, Path] | None
    warnings: tuple[str, ...]
    headers: Mapping[Path, Header] = field(repr=False)


def find_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """The weights at `path`: a `.safetensors` file, or a directory read in transformers' order.

    `model.safetensors` wins over `model.safetensors.index.json`. Links are followed. Raises FormatError for
    what `read_header` refuses, and: nothing there, a pickle or another format alone, shards without an index, an
    index whose paths leave the directory, an absent shard, a tensor that no listed shard holds.
    """
    path = Path(path)
    if path.is_dir():
        if os.path.lexists(path / SINGLE):
            return _single(path / SINGLE)
        if os.path.lexists(path / INDEX):
            return _sharded(path, path / INDEX)
        raise _nothing(path)
    if path.suffix in PICKLES:
        regular_size(path)
        raise FormatError(f"`{path}` may be a pickle, which is not read", hint=_pickle_hint(path.name))
    if path.suffix in OTHERS:
        regular_size(path)
        raise FormatError(f"`{path}` is not safetensors, and nothing else is read", hint="convert it first")
    return _single(path)


def _single(path: Path) -> WeightFiles:
    return WeightFiles((path,), None, (), {path: read_header(path)})


def _sharded(root: Path, index: Path) -> WeightFiles:
    weight_map = _weight_map(index, read_json(index))
    files = {name: root / name for name in dict.fromkeys(weight_map.values())}
    headers: dict[Path, Header] = {}
    for file in files.values():
        if not os.path.lexists(file):
            raise FormatError(
                f"`{file}` is not there, but `{index.name}` puts tensors in it",
                hint="the checkpoint is incomplete; fetch the missing shard",
            )
        headers[file] = read_header(file)
    owner: dict[str, Path] = {}
    warnings: list[str] = []
    for name, listed in weight_map.items():
        owner[name] = _locate(name, files[listed], headers, index, warnings)
    warnings += _unlisted(owner, headers, index)
    return WeightFiles(tuple(headers), owner, tuple(warnings), headers)


def _weight_map(index: Path, document: Any) -> dict[str, str]:
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(item, str) for item in found.values()):
        raise FormatError(f"`{index}` has no `weight_map` of tensor names to files")
    for name, file in found.items():
        check_name(name, f"`{index}`")
        parts = PurePosixPath(file).parts
        if not parts or file.startswith("/") or ".." in parts or "\\" in file or not file.isprintable():
            raise FormatError(f"`{index}` names the file `{printable(file)}`, which is not inside the checkpoint")
        if file.endswith(PICKLES):
            raise FormatError(f"`{index}` names the pickle `{file}`, which is not read", hint=_PICKLE_HINT)
    return found


def _locate(name: str, listed: Path, headers: Mapping[Path, Header], index: Path, warnings: list[str]) -> Path:
    if name in headers[listed].tensors:
        return listed
    holders = [file for file, header in headers.items() if name in header.tensors]
    if len(holders) != 1:
        where = "no listed shard has it" if not holders else f"{len(holders)} other shards do"
        raise FormatError(
            f"tensor `{printable(name)}` is not in `{listed.name}`, where `{index.name}` puts it, and {where}",
            hint="the index and the shards are of different versions; fetch the checkpoint again",
        )
    warnings.append(
        f"tensor `{printable(name)}` is read from `{holders[0].name}`: `{index.name}` puts it in `{listed.name}`"
    )
    return holders[0]


def _unlisted(owner: dict[str, Path], headers: Mapping[Path, Header], index: Path) -> list[str]:
    """Give tensors that the index does not name an owner: transformers reads them too."""
    warnings = []
    extra: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in extra:
                both = f"`{extra[name].name}` and `{file.name}`"
                raise FormatError(f"tensor `{printable(name)}` is in {both}, and `{index.name}` names neither")
            if name not in owner:
                extra[name] = file
            elif owner[name] != file:
                warnings.append(f"tensor `{printable(name)}` is also in `{file.name}`, where it is not read")
    if extra:
        first = printable(next(iter(extra)))
        warnings.append(f"{len(extra)} tensors are in the shards but not in `{index.name}`: `{first}` and on")
    owner.update(extra)
    return warnings


def _nothing(path: Path) -> FormatError:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return unreadable(path, error)
    tensors = [name for name in names if name.endswith(".safetensors")]
    if any("-of-" in name for name in tensors):
        return FormatError(
            f"`{path}` has shards but no `{INDEX}`", hint="fetch the index, or name one file to look at it alone"
        )
    if tensors:
        return FormatError(f"`{path}` has no `{SINGLE}`", hint=f"name the file itself, as `{path / tensors[0]}`")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return FormatError(f"`{path}` holds its weights as a pickle, `{pickles[0]}`", hint=_pickle_hint(pickles[0]))
    others = [name for name in names if name.endswith(OTHERS)]
    if others:
        return FormatError(f"`{path}` holds `{others[0]}` and no safetensors", hint="convert it first")
    return FormatError(f"`{path}` holds no weights: neither `{SINGLE}` nor `{INDEX}`")


def _pickle_hint(name: str) -> str:
    return _CKPT_HINT if name.endswith(".ckpt") else _PICKLE_HINT
