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

from rewright.formats import dejavu
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dtypes import stored_float, to_torch
from rewright.passes.calibration import has_tokenizer
from rewright.passes.errors import InputError
from rewright.passes.machine import give_back
from rewright.passes.models import sparse
from rewright.passes.models.families import FAMILIES, family_of
from rewright.passes.models.hyena_letters import letters_of, letters_tokenizer
from rewright.passes.models.packed import PackedLinear
from rewright.passes.models.packed_forms import Arena, Scratch
from rewright.passes.weights import Weights


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
        register()
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
    dtype = to_torch(stored_float({name: (entry.dtype, entry.shape) for name, entry in source.entries.items()}))
    assert dtype is not None
    return dtype


def load_tokenizer(source: Checkpoint) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none. Raises InputError for one that cannot be read."""
    from transformers import AutoTokenizer

    if not has_tokenizer(source):
        return None
    letters = letters_of(source.root)
    if letters is not None:
        return letters_tokenizer(letters)
    try:
        # unless told that code is not trusted, transformers asks
        return AutoTokenizer.from_pretrained(source.root, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever its many tokenizer classes raise
        raise InputError(f"the tokenizer of `{source.path}` cannot be read: {error}".splitlines()[0]) from error


def load(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
    predictors: bool = True,
) -> tuple[Any, Any | None]:
    """Open any checkpoint, by its path or opened, as (model, tokenizer); the tokenizer is None where there is none.

    `dtype` None keeps the stored one. With `packed` a quantised model runs on its codes, in the memory that they take;
    else they are decoded as it is loaded. Families of the layer walk are assembled here; any other goes to
    `AutoModelForCausalLM.from_pretrained`. Where `predictors` of contextual sparsity are attached, the model decodes
    with what they leave, on decoded weights (`passes/models/sparse.py`). Raises InputError or FormatError.
    """
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    found = dejavu.attached(source) if predictors else None
    packed = packed and found is None
    dtype = dtype or stored_dtype(source)
    config = source.config or {}
    if config.get("model_type") in FAMILIES or source.config is None:
        assembly = Assembly(source, dtype, torch.device(device), packed=packed)
        # first, since reading it takes memory that is free again for the weights
        tokenizer = load_tokenizer(source)
        give_back()
        assembly.place()
        if found is not None:
            sparse.attach(assembly.model, found)
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
    """Teach plain transformers our model classes, and to read `bitmask-w4` checkpoints; once is enough."""
    from rewright.passes import quantiser
    from rewright.passes.models import hyena

    quantiser.register()
    hyena.register()
