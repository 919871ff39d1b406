"""Checkpoints as running transformers models: whole, or one decoder layer at a time.

A model is built on the meta device and its parts are given their tensors when they are wanted, so that what is
resident is what is in use. With `models/` this is the only code that imports transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewright.formats import bitmask, compressed_tensors
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.compressed_tensors import Scheme, is_expert
from rewright.formats.dtypes import to_torch
from rewright.formats.foreign import refuse_scaled
from rewright.passes.calibration import has_tokenizer
from rewright.passes.errors import InputError
from rewright.passes.finite import all_finite
from rewright.passes.machine import give_back
from rewright.passes.models.families import FAMILIES, family_of
from rewright.passes.models.packed import PackedLinear
from rewright.passes.models.packed_forms import Arena, Bitmask, Scratch, Stored, Stream
from rewright.passes.packed_tensors import PackedWeight, read_packed, stored_shape

RUNTIME_HEAD = "lm_head.weight"
# Elements that are turned into another dtype at once.
_PART = 1 << 17


class Weights:
    """The tensors of a checkpoint under the names that a running model gives them.

    Packed matrices come out decoded, tied names find the tensor that is stored, a base prefix that the file lacks
    is looked past. Every floating-point tensor is checked: a value that is not finite is refused by name.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.family = FAMILIES.get(str((source.config or {}).get("model_type")))
        self.masking = bitmask.parse(source.config or {})
        self.packing = None if self.masking else compressed_tensors.parse(source.config or {})
        if self.packing is None and self.masking is None:
            refuse_scaled(source.entries)
        self._others: dict[str, list[str]] = {}
        if self.family is not None:
            # GPT-NeoX files call the head `embed_out`, models of today `lm_head`
            self.tie({RUNTIME_HEAD: self.family.head})

    def tie(self, names: dict[str, str]) -> None:
        """Say which names are one tensor, so that either may be the stored one."""
        for alias, name in names.items():
            self._others.setdefault(alias, []).append(name)
            self._others.setdefault(name, []).append(alias)

    def stored_name(self, name: str) -> str | None:
        """The stored spelling of a running model's name, without regard to ties."""
        for candidate in self.family.stored_as(name) if self.family else (name,):
            if candidate in self.source.entries or self._packed(candidate):
                return candidate
        return None

    def _packed(self, name: str) -> bool:
        module, entries = name.removesuffix(".weight"), self.source.entries
        return module + ".weight_mask" in entries or (name not in entries and module + ".weight_packed" in entries)

    def find(self, name: str) -> str:
        """The stored name that serves for a running model's. Raises InputError when there is none."""
        spelled = (self.stored_name(other) for other in (name, *self._others.get(name, ())))
        stored = next((found for found in spelled if found is not None), None)
        if stored is None:
            raise InputError(
                f"tensor `{name}` is missing from `{self.source.path}`", hint="is a shard of the download absent?"
            )
        return stored

    def is_packed(self, name: str) -> bool:
        """Whether a running model's tensor is a matrix of codes in the file, by its own name."""
        stored = self.stored_name(name)
        return stored is not None and self._packed(stored) and not is_expert(stored)

    def packed(self, name: str) -> PackedWeight:
        """The stored tensors of a packed matrix, undecoded, by a running model's name. Raises InputError."""
        module = self.find(name).removesuffix(".weight")
        return read_packed(self.source, module, self._form(module))

    def packed_bytes(self, name: str) -> int:
        """Bytes of an arena that holds a packed matrix as the file does."""
        module = self.find(name).removesuffix(".weight")
        leaves = (*compressed_tensors.SUFFIXES, *bitmask.SUFFIXES)
        held = [self.source.entries.get(f"{module}.{leaf}") for leaf in dict.fromkeys(leaves)]
        return sum(entry.nbytes + Arena.ALIGN for entry in held if entry is not None)

    def matrix(self, name: str) -> Stored:
        """The codes of a packed matrix, as the file has them. Raises InputError."""
        held = self.packed(name)
        if held.kind == "bitmask-w4":
            return Bitmask(held.tensors["weight_mask"], held.tensors["weight"], held.shape, held.scale)
        return Stream(held.tensors["weight_packed"], held.bits, held.shape, held.scale, held.zero())

    def differ(self, one: str, other: str) -> bool:
        """Whether both names are stored, with other values: then they are not one tensor, whatever the config says."""
        stored = self.stored_name(one), self.stored_name(other)
        if stored[0] is None or stored[1] is None or not set(stored) <= self.source.entries.keys():
            return False
        return not torch.equal(self.source.read(stored[0]), self.source.read(stored[1]))

    def experts_apart(self, layer: str) -> bool:
        """Whether the file has a matrix for each expert of a layer, where a running model has all in two tensors."""
        experts = self.family.experts if self.family else None
        return experts is not None and any(
            self.stored_name(f"{layer}.{fused}") is None and self._shares(f"{layer}.{fused}") for fused in experts.fused
        )

    def _shares(self, name: str) -> list[tuple[str, ...]]:
        """The matrices, from top to bottom, that make up each expert's share of a fused tensor; none for any other."""
        experts = self.family.experts if self.family else None
        for fused in experts.fused if experts else ():
            if experts is not None and experts.parts and name.endswith(f".{fused}"):
                layer = name.removesuffix(fused)
                count = range(experts.count(self.source.config or {}))
                return [tuple(f"{layer}{part}.weight" for part in experts.sources(fused, i)) for i in count]
        return []

    def _stored_shares(self, name: str) -> list[tuple[str, ...]]:
        spelled = (name, *self._others.get(name, ()))
        return self._shares(name) if all(self.stored_name(other) is None for other in spelled) else []

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype` if it is floating point, else as stored. Raises InputError naming what is wrong.

        A tensor of all experts comes together from their matrices where the file has those.
        """
        shares = self._stored_shares(name)
        if shares:
            whole = torch.empty(self.shape(name), dtype=dtype)
            for target, parts in zip(whole, shares, strict=True):
                torch.cat([self.read(part, dtype) for part in parts], out=target)
            return whole
        stored = self.find(name)
        if self._packed(stored):
            return self._checked(stored, self._decoded(stored, dtype), dtype)
        if not self._turns(stored, dtype):
            return self._checked(stored, self.source.read(stored), dtype)
        rows, columns = self.source.entries[stored].shape
        whole = torch.empty(rows, columns, dtype=dtype)
        step = max(1, _PART // max(1, columns))
        for start in range(0, rows, step):
            part = self.source.read_rows(stored, start, start + step)
            whole[start : start + step] = self._checked(stored, part, dtype)
        return whole

    def _turns(self, stored: str, dtype: torch.dtype) -> bool:
        """Whether a stored matrix is wanted in another dtype: then it is turned a few rows at a time."""
        entry = self.source.entries[stored]
        held = to_torch(entry.dtype)
        return len(entry.shape) == 2 and held is not None and held.is_floating_point and held != dtype

    @staticmethod
    def _checked(stored: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        cast = tensor.to(dtype)
        if not all_finite(cast):
            if all_finite(tensor):
                raise InputError(
                    f"tensor `{stored}` holds values past what {dtype} can hold", hint="use another `--dtype`"
                )
            raise InputError(f"tensor `{stored}` holds values that are not finite")
        return cast

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from headers but for packed ones. Raises InputError when it is missing."""
        shares = self._stored_shares(name)
        if shares:
            return (len(shares), *self._shape_of_shares(shares))
        stored = self.find(name)
        if not self._packed(stored):
            return tuple(self.source.entries[stored].shape)
        module = stored.removesuffix(".weight")
        return stored_shape(self.source.read(module + ".weight_shape"), module)

    def _shape_of_shares(self, shares: list[tuple[str, ...]]) -> tuple[int, int]:
        """The shape that each expert's share has. Raises InputError for matrices that do not fit together."""
        first = [self.shape(part) for part in shares[0]]
        for parts in shares:
            for part, wanted in zip(parts, first, strict=True):
                found = self.shape(part)
                if found != wanted or len(found) != 2 or found[1] != first[0][1]:
                    raise InputError(
                        f"tensor `{part}` has shape {list(found)}, unlike the other experts' {list(wanted)}"
                    )
        return sum(shape[0] for shape in first), first[0][1]

    def _decoded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        module = name.removesuffix(".weight")
        return read_packed(self.source, module, self._form(module)).decode(dtype)

    def _form(self, module: str) -> Scheme | bitmask.Bitmask:
        form: Scheme | bitmask.Bitmask | None = None
        if self.masking is not None and module + ".weight_mask" in self.source.entries:
            form = self.masking.of(module)
        elif self.packing is not None and module + ".weight_packed" in self.source.entries:
            form = self.packing.scheme_of(module)
        if form is None:
            raise InputError(f"`{module}` is packed, and `config.json` says nothing of how")
        return form


def config_of(source: Checkpoint) -> Any:
    """The transformers config of a checkpoint, quantisation left out. Raises InputError."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if source.config is None:
        raise InputError(f"`{source.path}` has no `config.json`", hint="name the whole checkpoint directory")
    plain = {key: value for key, value in source.config.items() if key != "quantization_config"}
    model_type = plain.pop("model_type", None)
    multiple = plain.get("pad_vocab_size_multiple")
    if isinstance(multiple, int) and multiple > 0 and isinstance(plain.get("vocab_size"), int):
        plain["vocab_size"] = -(-plain["vocab_size"] // multiple) * multiple
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"transformers knows no model type `{model_type}`")
    with _as_input(source):
        return AutoConfig.for_model(str(model_type), **plain)


@contextlib.contextmanager
def _as_input(source: Checkpoint) -> Iterator[None]:
    """Whatever transformers raises about a config or its weights is about the checkpoint, and is said in one line."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"transformers cannot take `{source.path}`: {said}") from error


def import_model(source: Checkpoint) -> None:
    """Import what a checkpoint's model needs, so that what is counted afterwards is the model's. Raises InputError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: F401  # imported on first use

    with _as_input(source), torch.device("meta"):
        AutoModelForCausalLM.from_config(config_of(source))


class Assembly:
    """A model whose parts are on the meta device until they are placed.

    `model` is the transformers model in evaluation mode, `layers` its decoder layers, `dtype` what floating-point
    parameters are placed in, `device` where. With `packed` linear layers run on the codes that the file has.
    """

    def __init__(self, source: Checkpoint, dtype: torch.dtype, device: torch.device, *, packed: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.config = config_of(source)
        self.weights = Weights(source)
        self.dtype, self.device = dtype, device
        with _as_input(source), torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        self.model.requires_grad_(False)
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        self._tied = {alias: name for alias, name in tied.items() if not self.weights.differ(alias, name)}
        self.weights.tie(self._tied)
        if packed:
            self._run_packed()

    def _run_packed(self) -> None:
        scratch, tied = Scratch(), {*self._tied, *self._tied.values()}
        for path, module in list(self.model.named_modules()):
            name = f"{path}.weight"
            if type(module) is nn.Linear and name not in tied and self.weights.is_packed(name):
                self.model.set_submodule(path, PackedLinear(module, scratch).eval())

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(family_of(self.weights.source.config).layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def check(self) -> None:
        """Hold the headers against the model: every tensor there, in the shape that the config makes it."""
        for name, parameter in self.model.named_parameters():
            self._check_shape(name, self.weights.shape(name), tuple(parameter.shape))

    def place(self, prefix: str = "", *, without: tuple[str, ...] = ()) -> None:
        """Give every meta tensor at or below `prefix` its value, but for those below a prefix in `without`."""
        modules = [
            (path, module)
            for path, module in self.model.get_submodule(prefix).named_modules(prefix=prefix)
            if not any(path == skip or path.startswith(skip + ".") for skip in without)
        ]
        empty = {f"{path}.weight": held for path, held in modules if isinstance(held, PackedLinear) and not held.form}
        arena = Arena(sum(map(self.weights.packed_bytes, empty))) if self.device.type == "cpu" else None
        for path, module in modules:
            self._place_buffers(path, module)
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    self._place_parameter(f"{path}.{leaf}" if path else leaf, module, leaf)
        # last: a dense matrix takes more to be looked through than a packed one
        for name, linear in empty.items():
            self._place_packed(name, linear, arena)

    def _place_buffers(self, path: str, module: nn.Module) -> None:
        """Buffers that no file holds are computed by the model class, as it does when it is made."""
        computed = [
            leaf
            for leaf, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and leaf in module._non_persistent_buffers_set
        ]
        for leaf in computed:
            buffer = module._buffers[leaf]
            module._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.device)  # type: ignore[union-attr]  # not None: filtered above
        if computed:
            self.model._init_weights(module)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                value = self.weights.read(f"{path}.{leaf}" if path else leaf, buffer.dtype)
                module._buffers[leaf] = value.to(self.device)

    def _place_packed(self, name: str, module: PackedLinear, arena: Arena | None) -> None:
        self._check_shape(name, self.weights.shape(name), (module.out_features, module.in_features))
        matrix = self.weights.matrix(name)
        largest = matrix.scale.abs().max().double() * 2.0**matrix.bits
        if not bool(largest <= torch.finfo(self.dtype).max):
            # what is wrong is said of the decoded weight
            self.weights.read(name, self.dtype)
        module.fill(matrix.to(self.device), self.dtype, arena)

    def _place_parameter(self, name: str, module: nn.Module, leaf: str) -> None:
        for alias, original in self._tied.items():
            other = {alias: original, original: alias}.get(name)
            twin = self.model.get_parameter(other) if other else None
            if twin is not None and not twin.is_meta:
                module._parameters[leaf] = twin
                return
        wanted = module._parameters[leaf]
        assert wanted is not None
        value = self.weights.read(name, self.dtype)
        self._check_shape(name, tuple(value.shape), tuple(wanted.shape))
        module._parameters[leaf] = nn.Parameter(value.to(self.device), requires_grad=False)

    def _check_shape(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if stored == wanted:
            return
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if wanted and stored and wanted[0] == vocabulary and stored[1:] == wanted[1:]:
            raise InputError(f"`config.json` says `vocab_size` {vocabulary}, and `{name}` has {stored[0]} rows")
        raise InputError(f"tensor `{name}` has shape {list(stored)}, and `config.json` makes it {list(wanted)}")

    def release(self, prefix: str) -> None:
        """Put a part back on the meta device."""
        self.release_module(self.model.get_submodule(prefix))

    @staticmethod
    def release_module(part: nn.Module) -> None:
        """Put a module of the model, and all below it, back on the meta device."""
        for module in part.modules():
            if isinstance(module, PackedLinear):
                module.clear()
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to("meta")


def stored_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's floating-point bytes have; packed matrices do not count."""
    sizes: dict[torch.dtype, int] = {}
    for entry in source.entries.values():
        dtype = to_torch(entry.dtype)
        if dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and not entry.name.endswith("_scale"):
            sizes[dtype] = sizes.get(dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def load_tokenizer(source: Checkpoint) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none. Raises InputError for one that cannot be read."""
    from transformers import AutoTokenizer

    if not has_tokenizer(source):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.root, local_files_only=True)
    except Exception as error:
        # transformers raises whatever its many tokenizer classes raise
        raise InputError(f"the tokenizer of `{source.path}` cannot be read: {error}".splitlines()[0]) from error


def load(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
) -> tuple[Any, Any | None]:
    """Open any checkpoint, by its path or opened, as (model, tokenizer); the tokenizer is None where there is none.

    `dtype` None keeps the stored one. With `packed` a quantised model runs on its codes, in the memory that they take;
    else they are decoded as it is loaded. Families of the layer walk are assembled here; any other goes to
    `AutoModelForCausalLM.from_pretrained`. Raises InputError or FormatError.
    """
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    dtype = dtype or stored_dtype(source)
    config = source.config or {}
    if config.get("model_type") in FAMILIES or source.config is None:
        assembly = Assembly(source, dtype, torch.device(device), packed=packed)
        # first, since reading it takes memory that is free again for the weights
        tokenizer = load_tokenizer(source)
        give_back()
        assembly.place()
        give_back()
        return assembly.model, tokenizer
    from transformers import AutoModelForCausalLM

    config_of(source)
    register()
    with _as_input(source):
        model, facts = AutoModelForCausalLM.from_pretrained(
            source.root, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    # transformers fills what it does not find with random numbers
    lacking = sorted({str(name) for name in facts["missing_keys"]} | {str(key[0]) for key in facts["mismatched_keys"]})
    if lacking:
        raise InputError(f"tensor `{lacking[0]}` is missing from `{source.path}`, or has another shape")
    return model.eval().to(device), load_tokenizer(source)


def register() -> None:
    """Teach plain transformers to read `bitmask-w4` checkpoints, decoded as they are loaded; once is enough."""
    from rewright.passes import quantiser

    quantiser.register()
