"""A walk through a model's decoder layers, one layer in memory at a time.

Hidden states of a set of token rows go through the layers in one or two streams: `dense` with the layers as they
are stored, `compressed` with whatever weights the caller has put in their place. A caller sees the linear layers,
the inputs that reach them and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rewright.passes.errors import BoundError
from rewright.passes.loading import Assembly

Stream = Literal["dense", "compressed"]

# Hidden states past this size are kept in a file, where the system can page them.
IN_MEMORY_BYTES = 1 << 30
# Tokens that go through a layer together. Fixed: another number would round the sums otherwise.
BATCH_TOKENS = 4096


class _Stopped(Exception):
    """The forward has come as far as it is wanted."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of a layer's matrices for some rows of tokens.

    `inputs` maps a linear layer's name within the decoder layer to its input per stream, (tokens, columns);
    layers that are fed the same tensor share it. `rows` are the token rows the batch is made of.
    """

    rows: slice
    inputs: dict[str, dict[Stream, torch.Tensor]]


def is_linear(module: nn.Module) -> bool:
    """A matrix with inputs and outputs: `nn.Linear`, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class Walk:
    """Iterate to get one `Layer` after the other, its weights in memory until the next is asked for.

    `tokens` (rows, length) int64. Raises InputError for what the checkpoint lacks, BoundError when a layer's
    output is not finite.
    """

    def __init__(
        self,
        assembly: Assembly,
        tokens: torch.Tensor,
        *,
        streams: tuple[Stream, ...] = ("compressed",),
        scratch: Path | None = None,
    ) -> None:
        self.assembly = assembly
        self.tokens = tokens
        self.streams = streams
        self.prefix = assembly.weights.family.layers if assembly.weights.family else ""
        self._returns_tuple = False
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._hidden: dict[Stream, torch.Tensor] = {}
        self._scratch = scratch
        rows = max(1, BATCH_TOKENS // max(1, tokens.shape[1]))
        self.batches = [slice(i, min(i + rows, len(tokens))) for i in range(0, len(tokens), rows)]

    def __iter__(self) -> Iterator[Layer]:
        self.assembly.place(without=(self.prefix, "lm_head", "embed_out"))
        for index in range(len(self.assembly.layers)):
            name = f"{self.prefix}.{index}"
            self.assembly.place(name)
            if index == 0:
                self._embed()
            layer = Layer(self, index, name)
            yield layer
            layer.finish()
            self.assembly.release(name)

    def _embed(self) -> None:
        """Run everything before the first layer, and note what each layer is called with."""
        self._learn_return_form()
        for rows in self.batches:
            first, arguments = self._capture(rows)
            self._arguments.setdefault(rows.stop - rows.start, arguments)
            for stream in self.streams:
                if stream not in self._hidden:
                    self._hidden[stream] = self._buffer(stream, first)
                self._hidden[stream][rows] = first.to(self._hidden[stream].device)

    def _buffer(self, stream: Stream, like: torch.Tensor) -> torch.Tensor:
        shape = (len(self.tokens), *like.shape[1:])
        size = shape[0] * like[0].numel()
        if self._scratch is None or size * like.element_size() <= IN_MEMORY_BYTES:
            return torch.empty(shape, dtype=like.dtype)
        path = self._scratch / f"hidden-{stream}.bin"
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    def _learn_return_form(self) -> None:
        """Layers of some families return a tensor, of others a tuple; a stand-in must do the same."""
        (args, kwargs), layer = self._first_call(), self.assembly.layers[0]
        with torch.no_grad():
            self._returns_tuple = isinstance(layer(*args, **kwargs), tuple)

    def _first_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise _Stopped

        self._run_base(self.batches[0], {0: stop})
        return seen[0]

    def _capture(self, rows: slice) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The first layer's input for these rows, and every layer's other arguments."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []
        last = len(self.assembly.layers) - 1

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            first.append(hidden)
            seen.append((args[1:], kwargs))
            if len(seen) > last:
                raise _Stopped
            return (hidden,) if self._returns_tuple else hidden

        self._run_base(rows, dict.fromkeys(range(last + 1), stand_in))
        return first[0], seen

    def _run_base(self, rows: slice, instead: dict[int, Callable[..., Any]]) -> None:
        """The model without its head, with some layers' forwards replaced."""
        layers = self.assembly.layers
        for index, forward in instead.items():
            layers[index].forward = forward  # taken back below
        try:
            with torch.no_grad():
                tokens = self.tokens[rows].to(self.assembly.device)
                self.assembly.model.base_model(input_ids=tokens, use_cache=False)
        except _Stopped:
            pass
        finally:
            for index in instead:
                del layers[index].forward

    def run_layer(self, layer: nn.Module, index: int, rows: slice, hidden: torch.Tensor) -> torch.Tensor:
        """One decoder layer on the hidden states (rows, length, width) of a batch."""
        args, kwargs = self._arguments[rows.stop - rows.start][index]
        with torch.no_grad():
            output = layer(hidden.to(self.assembly.device), *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def hidden(self, stream: Stream, rows: slice) -> torch.Tensor:
        """The hidden states that stand before the next layer, (rows, length, width)."""
        return self._hidden[stream][rows]

    def store(self, stream: Stream, rows: slice, hidden: torch.Tensor, name: str) -> None:
        """Overwrite a batch's hidden states with a layer's output. Raises BoundError if it is not finite."""
        if not bool(torch.isfinite(hidden).all()):
            raise BoundError(
                f"activations after layer `{name}` are not finite",
                hint="try `--dtype f32`, or check the source",
            )
        self._hidden[stream][rows] = hidden.to(self._hidden[stream].device)

    def logits(self, stream: Stream, rows: slice) -> torch.Tensor:
        """The model's logits (rows, length, vocabulary) from the hidden states as they stand."""
        self.assembly.place(without=(self.prefix,))
        last = len(self.assembly.layers) - 1

        def resume(*args: Any, **kwargs: Any) -> Any:
            hidden = self.hidden(stream, rows).to(self.assembly.device)
            return (hidden,) if self._returns_tuple else hidden

        for index in range(last + 1):
            self.assembly.layers[index].forward = resume  # taken back below
        try:
            with torch.no_grad():
                tokens = self.tokens[rows].to(self.assembly.device)
                result: torch.Tensor = self.assembly.model(input_ids=tokens, use_cache=False).logits
        finally:
            for index in range(last + 1):
                del self.assembly.layers[index].forward
        return result


class Layer:
    """A decoder layer during a walk: look at its inputs, replace its weights, go on."""

    def __init__(self, walk: Walk, index: int, name: str) -> None:
        self.index, self.name = index, name
        self._walk = walk
        self._module = walk.assembly.layers[index]
        self._advanced: set[Stream] = set()
        self.linears: dict[str, nn.Module] = {
            path: module for path, module in self._module.named_modules() if is_linear(module)
        }

    def weight(self, linear: str) -> torch.Tensor:
        """A matrix as the model holds it now; for Conv1D (inputs, outputs)."""
        weight = self.linears[linear].weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def inputs(self) -> Iterator[Batch]:
        """Every batch's inputs to the linear layers, before any weight is replaced.

        The dense stream moves past this layer on the way, so this is asked for at most once a layer.
        """
        if "dense" in self._advanced:
            raise RuntimeError("the dense stream has passed this layer")
        for rows in self._walk.batches:
            found: dict[str, dict[Stream, torch.Tensor]] = {path: {} for path in self.linears}
            for stream in self._walk.streams:
                hidden = self._walk.hidden(stream, rows)
                seen, output = self._run_hooked(rows, hidden)
                for path, tensor in seen.items():
                    found[path][stream] = tensor
                if stream == "dense":
                    self._walk.store(stream, rows, output, self.name)
            yield Batch(rows, {path: streams for path, streams in found.items() if streams})
        if "dense" in self._walk.streams:
            self._advanced.add("dense")

    def _run_hooked(self, rows: slice, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One forward; the inputs of the linear layers as (tokens, columns), shared where they are one tensor."""
        seen: dict[str, torch.Tensor] = {}
        flat: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                tensor = args[0]
                # the first of the pair keeps the tensor alive, so that its id stays its own
                seen[path] = flat.setdefault(id(tensor), (tensor, tensor.reshape(-1, tensor.shape[-1])))[1]

            return note

        handles = [module.register_forward_pre_hook(hook(path)) for path, module in self.linears.items()]
        try:
            output = self._walk.run_layer(self._module, self.index, rows, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return seen, output

    def replace(self, linear: str, weight: torch.Tensor) -> None:
        """Put a matrix in place of a linear layer's, in the layout and dtype the model has it."""
        if "dense" in self._walk.streams and "dense" not in self._advanced:
            self._advance("dense")
        module, held = self.linears[linear], self.weight(linear)
        assert weight.shape == held.shape
        module.weight = nn.Parameter(weight.to(held.device, held.dtype), requires_grad=False)

    def finish(self) -> None:
        """Move every stream that is still before this layer past it."""
        for stream in self._walk.streams:
            if stream not in self._advanced:
                self._advance(stream)

    def _advance(self, stream: Stream) -> None:
        for rows in self._walk.batches:
            output = self._walk.run_layer(self._module, self.index, rows, self._walk.hidden(stream, rows))
            self._walk.store(stream, rows, output, self.name)
        self._advanced.add(stream)
