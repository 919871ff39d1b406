"""The matrices of a decoder layer, where a running model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from rewright.passes.models.families import FUSED, Experts

# Called with a matrix's name, what it was given and what it made of it (None: not asked for), as the module has them.
Note = Callable[[str, torch.Tensor, torch.Tensor | None], None]


class Slot(Protocol):
    """A matrix of a layer.

    `weight` is in the layout of the module: (outputs, inputs), or (inputs, outputs) for GPT-2's Conv1D and the experts
    of gpt_oss. `stage` is None, or names the matrices that a layer's tokens reach at one time though each of them is
    given others.
    """

    @property
    def stage(self) -> str | None: ...

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    def put(self, weight: torch.Tensor) -> None:
        """Run with this weight from now on; it is made the module's in device and dtype."""

    def reset(self) -> None:
        """Run with the weight that was there before any was put."""

    def use(self, *, original: bool) -> None:
        """Run with the weight that was there before, for a time, or again with the one that was put."""


class Linear:
    """The weight of a linear module."""

    stage = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._original, self._put = self.weight, self.weight

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

    def put(self, weight: torch.Tensor) -> None:
        held = self._original
        assert weight.shape == held.shape
        self._put = nn.Parameter(weight.to(held.device, held.dtype), requires_grad=False)
        self.use(original=False)

    def reset(self) -> None:
        self._put = self._original
        self.use(original=True)

    def use(self, *, original: bool) -> None:
        self.module.weight = self._original if original else self._put

    @contextmanager
    def watched(self, path: str, note: Note, *, outputs: bool) -> Iterator[None]:
        """Call `note` at every use: after it with `outputs`, else before."""
        # Falcon adds the attention's output to what this returns, in place
        mutated = type(self.module).__name__ == "FalconLinear"

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            note(path, args[0], output.clone() if mutated else output)

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            note(path, args[0], None)

        handle = self.module.register_forward_hook(hook) if outputs else self.module.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()


class Fused:
    """A tensor (experts, ...) of all experts' matrices, as it was, and its twin, which new weights go to.

    The model runs with one of the two, so that all experts of a layer change sides at once.
    """

    def __init__(self, module: nn.Module, leaf: str, transposed: bool) -> None:
        self.module, self.leaf, self.transposed = module, leaf, transposed
        self._original = self.used
        self._twin: torch.Tensor | None = None

    @property
    def used(self) -> torch.Tensor:
        return self.module.get_parameter(self.leaf).data

    @property
    def biases(self) -> torch.Tensor | None:
        return self.module._parameters.get(f"{self.leaf}_bias")

    def put(self, share: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor | None) -> None:
        """Run with `weight` as an expert's share, or with the original one."""
        if self._twin is None:
            self._twin = self._original.clone()
        share(self._twin).copy_(share(self._original) if weight is None else weight)
        self.use(original=False)

    def use(self, *, original: bool) -> None:
        tensor = self._original if original or self._twin is None else self._twin
        if tensor.data_ptr() != self.used.data_ptr():
            self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)

    def apply(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """An expert's outputs (tokens, outputs), bias and all."""
        weight = self.used[expert]
        outputs = inputs @ (weight if self.transposed else weight.t())
        return outputs if self.biases is None else outputs + self.biases[expert]


class Expert:
    """A matrix of one expert: its share of a tensor that holds all experts', or some `rows` of that share."""

    def __init__(self, fused: Fused, expert: int, rows: slice = slice(None)) -> None:
        self.fused, self.expert, self.rows = fused, expert, rows
        self.stage = fused.leaf

    def _share(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.expert, self.rows]

    @property
    def weight(self) -> torch.Tensor:
        return self._share(self.fused.used)

    @property
    def bias(self) -> torch.Tensor | None:
        # `rows` are all of them wherever there is a bias
        return None if self.fused.biases is None else self.fused.biases[self.expert]

    def put(self, weight: torch.Tensor) -> None:
        assert weight.shape == self.weight.shape
        self.fused.put(self._share, weight)

    def reset(self) -> None:
        self.fused.put(self._share, None)

    def use(self, *, original: bool) -> None:
        self.fused.use(original=original)


@contextmanager
def watched(slots: Mapping[str, Slot], note: Note, *, outputs: bool = True) -> Iterator[None]:
    """Call `note` whenever one of some matrices of a layer is used; it may raise to stop the forward.

    Without `outputs` it is called before a matrix is used, and is not told what comes out.

    For an expert's it is called once a forward, with the tokens that were routed there, in their order; there may be
    none. The model's own way through the experts, whichever it is, is left alone.
    """
    routed: dict[str, Expert] = {}
    with ExitStack() as stack:
        for path, slot in slots.items():
            if isinstance(slot, Linear):
                stack.enter_context(slot.watched(path, note, outputs=outputs))
            elif isinstance(slot, Expert):
                routed[path] = slot
        if routed:
            stack.enter_context(_watched_experts(routed, note, outputs=outputs))
        yield


@contextmanager
def _watched_experts(slots: Mapping[str, Expert], note: Note, *, outputs: bool) -> Iterator[None]:
    """Before the experts run, do what each of them will do, one after the other."""
    module = next(iter(slots.values())).fused.module
    uses: dict[tuple[str, int], list[str]] = {}
    for path, slot in slots.items():
        uses.setdefault((slot.stage, slot.expert), []).append(path)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        # in the order of a forward: all first matrices, then all second
        for (stage, expert), paths in sorted(uses.items(), key=lambda use: FUSED.index(use[0][0])):
            fused = slots[paths[0]].fused
            inputs = hidden[(chosen == expert).any(dim=-1)]
            if stage != FUSED[0]:
                first = Fused(module, FUSED[0], fused.transposed)
                inputs = module._apply_gate(first.apply(expert, inputs))  # type: ignore[operator]  # a method
            made = fused.apply(expert, inputs) if outputs else None
            for path in paths:
                note(path, inputs, made if made is None or fused.transposed else made[:, slots[path].rows])

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def is_linear(module: nn.Module) -> bool:
    """A matrix with inputs and outputs: `nn.Linear`, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linears_of(layer: nn.Module, experts: Experts | None = None, *, apart: bool = False) -> dict[str, Slot]:
    """The matrices of a decoder layer by their names within it, in the order of the module's definition.

    Those of experts come last, named as the file has them: `apart`, a matrix for each part of each expert, or as
    `<tensor>[<expert>]`.
    """
    found: dict[str, Slot] = {path: Linear(module) for path, module in layer.named_modules() if is_linear(module)}
    modules = dict(layer.named_modules())
    if experts is None or experts.module not in modules:
        return found
    for name in experts.fused:
        fused = Fused(modules[experts.module], name.rpartition(".")[2], experts.transposed)
        for expert, share in enumerate(fused.used):
            if apart:
                parts = experts.sources(name, expert)
                height = len(share) // len(parts)
                for place, part in enumerate(parts):
                    found[part] = Expert(fused, expert, slice(place * height, (place + 1) * height))
            else:
                found[f"{name}[{expert}]"] = Expert(fused, expert)
    return found
