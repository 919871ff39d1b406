"""The bitmask form for plain transformers: a config and a quantiser for its public registry.

Linear layers are given the shapes that the file has before weights are read, and are linear layers again, decoded in
the dtype of the model, once they are. Experts, which transformers joins as it reads them, are decoded on the way.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rewright.formats.bitmask import METHOD, SCALE_DTYPES, SUFFIXES, Bitmask, bitmask_specs, read_config
from rewright.formats.compressed_tensors import is_expert
from rewright.formats.dtypes import to_torch
from rewright.formats.header import TensorInfo, read_header
from rewright.kernels.bitmask import unpack_bitmask
from rewright.passes.errors import InputError
from rewright.passes.matrices import check_spec
from rewright.passes.packed_tensors import check_mask, decode

_CODES = ("weight_mask", "weight", "weight_scale")


class BitmaskConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """A `quantization_config` of the form, as transformers keeps it. Raises FormatError for one that cannot be."""

    # a model is dense once it is loaded, and is saved as one
    dequantize = True

    def __init__(self, **stated: Any) -> None:
        read_config(stated)
        self.__dict__.update(stated)
        self.quant_method = METHOD


class BitmaskQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Reads modules of the form and decodes them. Raises InputError for tensors that are missing or cannot be."""

    def __init__(self, quantization_config: BitmaskConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.records = read_config(quantization_config.to_dict())
        self.stored: dict[str, TensorInfo] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        for file in checkpoint_files or ():
            self.stored |= read_header(file).tensors
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        base = model.base_model_prefix
        linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        for path, linear in linears:
            # a base model alone lacks the prefix that its file has
            spelled = (path, f"{base}.{path}", path.removeprefix(f"{base}."))
            name = next((name for name in spelled if f"{name}.weight" in self.stored), path)
            record = self.records.of(name)
            if record is None:
                if f"{name}.weight_mask" in self.stored:
                    raise InputError(f"`{name}` is packed, and `config.json` says nothing of how")
                continue
            if self.stored:
                self._check(name, tuple(linear.weight.shape), record)
            model.set_submodule(path, BitmaskLinear(name, record, linear))

    def _check(self, name: str, shape: tuple[int, ...], record: Bitmask) -> None:
        """Hold what the files have of a module against what it must have."""
        for leaf in SUFFIXES:
            if f"{name}.{leaf}" not in self.stored:
                raise InputError(f"tensor `{name}.{leaf}` is missing")
        for spec in bitmask_specs(name, shape, record, self.stored[f"{name}.weight_scale"].dtype):
            found = self.stored[spec.name]
            check_spec(spec, found.dtype, found.shape, shape)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        held = [(path, module) for path, module in model.named_modules() if isinstance(module, BitmaskLinear)]
        for path, module in held:
            model.set_submodule(path, module.decoded())
        for name, parameter in model.named_parameters():
            # transformers 5.17 leaves what it renames, in a quantised model, in the dtype of the file
            if parameter.dtype != self.dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self.dtypes[name])
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Have the converters of experts gather the tensors of this form, and decode them first."""
        if not any(is_expert(name) and name.endswith(".weight_mask") for name in self.stored):
            return weight_conversions
        return [self._decoding(converter) for converter in weight_conversions]

    def _decoding(self, converter: Any) -> Any:
        sources = converter.source_patterns
        if not isinstance(converter, WeightConverter) or not all(
            "experts" in source and source.endswith(".weight") for source in sources
        ):
            return converter
        return WeightConverter(
            # a pattern is searched for, and `weight` is how the others begin
            source_patterns=[re.sub("weight$", f"{leaf}$", source) for leaf in SUFFIXES for source in sources],
            target_patterns=converter._original_target_patterns,
            operations=[DecodeExperts(self), *converter.operations],
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class BitmaskLinear(nn.Module):
    """Where the tensors of a linear layer's file are read to; it does not run."""

    def __init__(self, name: str, record: Bitmask, linear: nn.Linear) -> None:
        super().__init__()
        self.name, self.record = name, record
        # out of reach of `named_parameters`
        self.linear = (linear,)
        self.register_parameter("bias", linear.bias)
        for spec in bitmask_specs(name, tuple(linear.weight.shape), record, SCALE_DTYPES[0]):
            leaf = spec.name.removeprefix(f"{name}.")
            # the reader casts scales to the dtype of the model, as decoding does
            dtype = linear.weight.dtype if leaf == "weight_scale" else to_torch(spec.dtype)
            held = torch.empty(spec.shape, dtype=dtype, device=linear.weight.device)
            self.register_parameter(leaf, nn.Parameter(held, requires_grad=False))

    def decoded(self) -> nn.Linear:
        """The linear layer that was there, with the weight that these tensors hold."""
        tensors = [self.get_parameter(leaf).data for leaf in _CODES]
        if any(tensor.is_meta for tensor in tensors):
            raise InputError(f"`{self.name}` is not in memory, and cannot be decoded", hint="load without offloading")
        linear = self.linear[0]
        weight = _decode(self.name, self.record.nnz, tensors, linear.weight.dtype)
        linear.weight, linear._parameters["bias"] = nn.Parameter(weight), self._parameters["bias"]
        return linear


class DecodeExperts(ConversionOps):  # type: ignore[misc]  # transformers is untyped here
    """Makes lists of dense weights of the lists of tensors that hold them, one of each an expert."""

    def __init__(self, hf_quantizer: BitmaskQuantizer) -> None:
        # by this name a reader knows that it must not cast what goes in here
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: Mapping[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, list[torch.Tensor]]:
        dtype = model.get_parameter(full_layer_name).dtype
        found = {}
        for pattern in input_dict:
            if not pattern.endswith(".weight$"):
                continue
            lists = [input_dict[re.sub(r"weight\$$", f"{leaf}$", pattern)] for leaf in _CODES]
            made = [
                # plain transformers decodes packed experts in the dtype of their scales
                _decode(full_layer_name, 2 * tensors[1].shape[2], tensors, tensors[2].dtype).to(dtype)
                for tensors in zip(*lists, strict=True)
            ]
            found[pattern] = made
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        return _Nothing()


class _Nothing(ConversionOps):  # type: ignore[misc]  # transformers is untyped here
    """A model that was decoded is saved as it is."""

    def convert(self, input_dict: Mapping[str, Any], **_: Any) -> Mapping[str, Any]:
        return input_dict


def _decode(name: str, nnz: int, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    mask, values, scale = tensors
    check_mask(mask, nnz, name)
    return decode(unpack_bitmask(mask, values), scale, None, dtype)


@functools.cache
def register() -> None:
    """Enter the form into transformers' registry of quantisation methods, once."""
    register_quantization_config(METHOD)(BitmaskConfig)
    register_quantizer(METHOD)(BitmaskQuantizer)
