"""A walk through a model's decoder layers, one layer in memory at a time.

Hidden states of a set of token rows go through the layers in one or two streams: `dense` with the layers as they
are stored, `compressed` with whatever weights the caller has put in their place. A caller sees the linear layers,
what goes into them and comes out of them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from rewright.passes.errors import BoundError
from rewright.passes.loading import Assembly
from rewright.passes.models.linears import Slot, linears_of, watched

Stream = Literal["dense", "compressed"]
Part = Literal["sampled", "rest", "held_out"]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# Hidden states past this size are kept in a file, where the system can page them.
IN_MEMORY_BYTES = 1 << 30
# Tokens that go through a layer together. Fixed: another number would round the sums otherwise.
BATCH_TOKENS = 4096


class _Stopped(Exception):
    """The forward has come as far as it is wanted."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a linear layer was given, (tokens, columns), and what it made of it, (tokens, rows), with its bias.

    `outputs` is None where it was not asked for.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What a layer's matrices met for some rows of tokens.

    `seen` maps a linear layer's name within the decoder layer to what it met in each stream; layers that are fed
    one tensor share it. `gaps` holds, for a matrix that writes to the residual stream, the difference between the
    streams (dense less compressed, (tokens, rows)) in what its output is added to. `part` tells the calibration's
    rows on which errors are taken, the rest of them, and the rows past the walk's `samples`.
    """

    rows: slice
    part: Part
    seen: dict[str, dict[Stream, Seen]] = field(default_factory=dict)
    gaps: dict[str, torch.Tensor] = field(default_factory=dict)


class Walk:
    """Iterate to get one `Layer` after the other, its weights in memory until the next is asked for.

    `tokens` (rows, length) int64. The compressed stream carries every row, the dense one those from `dense_from`
    on (None: none). Rows from `samples` on are held out. A `resident` walk has the whole model in memory. Raises
    InputError for what the checkpoint lacks, BoundError when a layer's output is not finite.
    """

    def __init__(
        self,
        assembly: Assembly,
        tokens: torch.Tensor,
        *,
        samples: int | None = None,
        dense_from: int | None = None,
        scratch: Path | None = None,
        resident: bool = False,
    ) -> None:
        self.assembly = assembly
        self.resident = resident
        self.tokens = tokens
        self.samples = len(tokens) if samples is None else samples
        self.dense_from = len(tokens) if dense_from is None else dense_from
        self.prefix = assembly.weights.family.layers if assembly.weights.family else ""
        self._returns_tuple = False
        self._calls: dict[int, list[Call]] = {}
        self._hidden: dict[str, torch.Tensor] = {}
        self._scratch = scratch
        size = max(1, BATCH_TOKENS // max(1, tokens.shape[1]))
        # as many of the calibration's rows as are held out, for errors to compare
        self.sampled = min(self.samples, max(len(tokens) - self.samples, 1)) if self.dense_from < len(tokens) else 0
        cuts = sorted({0, self.sampled, min(self.dense_from, len(tokens)), self.samples, len(tokens)})
        self.batches = [
            slice(i, min(i + size, stop)) for start, stop in pairwise(cuts) for i in range(start, stop, size)
        ]

    def part(self, rows: slice) -> Part:
        """What the rows of a batch are for."""
        if rows.start >= self.samples:
            return "held_out"
        return "sampled" if rows.stop <= self.sampled else "rest"

    def streams(self, rows: slice) -> tuple[Stream, ...]:
        """The streams that carry these rows."""
        return ("dense", "compressed") if rows.start >= self.dense_from else ("compressed",)

    def __iter__(self) -> Iterator[Layer]:
        self.assembly.place(without=() if self.resident else (self.prefix, "lm_head", "embed_out"))
        for index in range(len(self.assembly.layers)):
            name = f"{self.prefix}.{index}"
            self.assembly.place(name)
            if index == 0:
                self._embed()
            layer = Layer(self, index, name)
            yield layer
            layer.finish()
            if not self.resident:
                self.assembly.release(name)

    def _embed(self) -> None:
        """Run everything before the first layer."""
        self._learn_return_form()
        for rows in self.batches:
            first, calls = self._capture(rows)
            self._calls.setdefault(rows.stop - rows.start, calls)
            for stream in self.streams(rows):
                if stream not in self._hidden:
                    self._hidden[stream] = self._buffer(stream, first)
                self.hidden(stream, rows).copy_(first)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Room for the hidden states of a stream; for `next` as well, where the dense ones go when they move on."""
        count = len(self.tokens) - (0 if name == "compressed" else self.dense_from)
        shape = (count, *like.shape[1:])
        size = count * like[0].numel()
        if self._scratch is None or size * like.element_size() <= IN_MEMORY_BYTES:
            return torch.empty(shape, dtype=like.dtype)
        path = self._scratch / f"hidden-{name}.bin"
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    def _learn_return_form(self) -> None:
        """Layers of some families return a tensor, of others a tuple; a stand-in must do the same."""
        (args, kwargs), layer = self._first_call(), self.assembly.layers[0]
        with torch.no_grad():
            self._returns_tuple = isinstance(layer(*args, **kwargs), tuple)

    def _first_call(self) -> Call:
        seen: list[Call] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise _Stopped

        self._run_base(self.batches[0], {0: stop})
        return seen[0]

    def _capture(self, rows: slice) -> tuple[torch.Tensor, list[Call]]:
        """The first layer's input for these rows, and every layer's other arguments."""
        seen: list[Call] = []
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

    def run_layer(
        self, index: int, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One decoder layer on hidden states (rows, length, width), with `weights` for the parameters so named.

        Gradients flow where they are enabled.
        """
        count = len(hidden)
        if count not in self._calls:
            self._calls[count] = self._capture(slice(0, count))[1]
        args, kwargs = self._calls[count][index]
        layer, given = self.assembly.layers[index], (hidden.to(self.assembly.device), *args)
        output = torch.func.functional_call(layer, dict(weights), given, kwargs) if weights else layer(*given, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def hidden(self, stream: Stream, rows: slice) -> torch.Tensor:
        """The hidden states that stand before the next layer, (rows, length, width)."""
        return self._rows(stream, rows)

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        before = 0 if name == "compressed" else self.dense_from
        return self._hidden[name][rows.start - before : rows.stop - before]

    def store(self, stream: Stream, rows: slice, hidden: torch.Tensor, name: str) -> None:
        """Take a layer's output for a batch: in place, or for the dense stream beside what it came from.

        Raises BoundError if it is not finite.
        """
        if not bool(torch.isfinite(hidden).all()):
            raise BoundError(
                f"activations after layer `{name}` are not finite",
                hint="try `--dtype f32`, or check the source",
            )
        if stream == "dense" and "next" not in self._hidden:
            self._hidden["next"] = self._buffer("next", hidden)
        self._rows("next" if stream == "dense" else stream, rows).copy_(hidden)

    def pick(self, name: Literal["compressed", "dense", "next"], rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of some rows, by index: of a stream before the layer, or of the dense one after it (`next`),
        once `Layer.look_ahead` has been there.
        """
        return self._hidden[name][rows - (0 if name == "compressed" else self.dense_from)]

    def turn(self) -> None:
        """Go on from where the dense stream is after the layer."""
        if "next" in self._hidden:
            self._hidden["dense"], self._hidden["next"] = self._hidden["next"], self._hidden["dense"]

    def logits(self, stream: Stream, rows: slice) -> torch.Tensor:
        """The model's logits (rows, length, vocabulary) from the hidden states as they stand."""
        self.assembly.place(without=(self.prefix,))
        return self.head(self.hidden(stream, rows), rows)

    def onward(self, index: int, rows: slice) -> torch.Tensor:
        """The logits of some rows when the compressed stream goes on from layer `index` through the rest.

        Only in a resident walk.
        """
        hidden = self.hidden("compressed", rows)
        with torch.no_grad():
            for later in range(index, len(self.assembly.layers)):
                hidden = self.run_layer(later, hidden)
        return self.head(hidden, rows)

    def head(self, hidden: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Logits from what the last layer puts out for some rows."""
        last = len(self.assembly.layers) - 1

        def resume(*args: Any, **kwargs: Any) -> Any:
            states = hidden.to(self.assembly.device)
            return (states,) if self._returns_tuple else states

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
    """A decoder layer during a walk: look at what its matrices meet, replace them, go on.

    `linears` are its matrices by their names within it. The compressed stream runs with the weights that were put
    in their place so far, the dense one with those of the file. `errors` holds, once the layer is finished, what the
    streams differ by, |compressed - dense|^2 / |dense|^2, for the calibration's rows and the held-out ones.
    """

    def __init__(self, walk: Walk, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.walk = walk
        self.module = walk.assembly.layers[index]
        weights = walk.assembly.weights
        experts = weights.family.experts if weights.family else None
        self.linears: dict[str, Slot] = linears_of(self.module, experts, apart=weights.experts_apart(name))
        self.errors: dict[str, float] = {}
        self._replaced: set[str] = set()
        self._moved: set[tuple[Stream, int]] = set()
        self._finished = False

    def weight(self, linear: str) -> torch.Tensor:
        """A matrix of the compressed stream, in the model's layout."""
        return self.linears[linear].weight

    def stages(self) -> list[list[tuple[str, ...]]]:
        """The matrices in the order in which a forward reaches them.

        What a forward reaches at one time is a stage, a list of groups that are fed one tensor each: all experts'
        first matrices are one, with a group for each expert, and so are their second.
        """
        order: dict[int | str, dict[int, list[str]]] = {}
        held: list[torch.Tensor] = []

        def note(path: str, inputs: torch.Tensor, outputs: torch.Tensor | None) -> None:
            # the tensor is kept alive, so that its id stays its own
            held.append(inputs)
            stage = order.setdefault(self.linears[path].stage or id(inputs), {})
            stage.setdefault(id(inputs), []).append(path)

        with watched(self.linears, note), torch.no_grad():
            self.walk.run_layer(self.index, self.walk.hidden("compressed", slice(0, 1)))
        return [[tuple(paths) for paths in groups.values()] for groups in order.values()]

    def meet(
        self, paths: Sequence[str], *, dense: bool, writers: Sequence[str] = (), look_ahead: bool = False
    ) -> Iterator[Batch]:
        """Every batch's inputs of some matrices, in the compressed stream and with `dense` in both.

        With `dense` their outputs are there too, for those that write to the residual stream in every batch, for
        others but on the calibration's `rest`.
        `writers` are the matrices of the layer that write to the residual stream, in order: for those among `paths`
        the gap between the streams is taken, before the first from the layer's input, before the last from its
        output less the matrix's own. With `look_ahead` the dense stream's way through the layer is noted.
        """
        whole = len(writers) > 1 and writers[-1] in paths
        for rows in self.walk.batches:
            batch = Batch(rows, self.walk.part(rows))
            outputs = dense and (batch.part != "rest" or not set(writers).isdisjoint(paths))
            ends: dict[Stream, torch.Tensor | None] = {}
            streams: tuple[Stream, ...] = self.walk.streams(rows) if dense else ("compressed",)
            for stream in streams:
                far = whole or (look_ahead and stream == "dense")
                seen, ends[stream] = self._run_watched(stream, rows, paths, outputs=outputs, to_the_end=far)
                for path, found in seen.items():
                    batch.seen.setdefault(path, {})[stream] = found
            if "dense" in streams:
                for path in set(writers) & set(paths):
                    batch.gaps[path] = self._gap(path, batch, ends if path == writers[-1] and whole else None)
                end = ends["dense"]
                if look_ahead and end is not None:
                    self._move("dense", rows, end)
            yield batch

    def look_ahead(self) -> None:
        """Run the dense stream through the layer, for `Walk.pick`; from there it goes on."""
        self._pass("dense")

    def _pass(self, stream: Stream) -> None:
        """Move the batches of a stream that are still before this layer past it."""
        self._use(stream)
        for rows in self.walk.batches:
            if stream in self.walk.streams(rows) and (stream, rows.start) not in self._moved:
                with torch.no_grad():
                    output = self.walk.run_layer(self.index, self.walk.hidden(stream, rows))
                self._move(stream, rows, output)
        self._use("compressed")

    def _gap(self, path: str, batch: Batch, ends: dict[Stream, torch.Tensor | None] | None) -> torch.Tensor:
        def before(stream: Stream) -> torch.Tensor:
            if ends is None:
                return self.walk.hidden(stream, batch.rows).flatten(0, 1)
            end, own = ends[stream], batch.seen[path][stream].outputs
            assert end is not None
            assert own is not None
            return end.flatten(0, 1) - own

        return before("dense") - before("compressed")

    def _run_watched(
        self, stream: Stream, rows: slice, paths: Sequence[str], *, outputs: bool, to_the_end: bool
    ) -> tuple[dict[str, Seen], torch.Tensor | None]:
        """One forward in a stream; stops after the last of `paths` unless the layer's output is wanted too."""
        seen: dict[str, Seen] = {}
        flat: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        waiting = set(paths)
        output = None
        self._use(stream)

        def note(path: str, inputs: torch.Tensor, outputs: torch.Tensor | None) -> None:
            # the first of the pair keeps the tensor alive, so that its id stays its own
            shared = flat.setdefault(id(inputs), (inputs, inputs.reshape(-1, inputs.shape[-1])))[1]
            made = None if outputs is None else outputs.reshape(-1, outputs.shape[-1])
            seen[path] = Seen(shared, made, self.linears[path].bias)
            waiting.discard(path)
            if not waiting and not to_the_end:
                raise _Stopped

        with watched({path: self.linears[path] for path in paths}, note, outputs=outputs):
            try:
                with torch.no_grad():
                    output = self.walk.run_layer(self.index, self.walk.hidden(stream, rows))
            except _Stopped:
                pass
        self._use("compressed")
        return seen, output

    def _use(self, stream: Stream) -> None:
        for path in self._replaced:
            self.linears[path].use(original=stream == "dense")

    def replace(self, linear: str, weight: torch.Tensor) -> None:
        """Put a matrix in place of a linear layer's in the compressed stream, in the model's layout."""
        self.linears[linear].put(weight)
        self._replaced.add(linear)

    def restore(self, linear: str) -> None:
        """Take the file's weight again."""
        self.linears[linear].reset()
        self._replaced.discard(linear)

    def finish(self) -> None:
        """Move every stream that is still before this layer past it, and compare the two; once."""
        if self._finished:
            return
        self._finished = True
        self._pass("compressed")
        self._pass("dense")
        self.walk.turn()
        gaps = {False: 0.0, True: 0.0}
        wholes = {False: 0.0, True: 0.0}
        for rows in self.walk.batches:
            if "dense" in self.walk.streams(rows):
                dense, ours = (self.walk.hidden(stream, rows).float() for stream in ("dense", "compressed"))
                held_out = self.walk.part(rows) == "held_out"
                gaps[held_out] += float((ours - dense).square_().sum(dtype=torch.float64))
                wholes[held_out] += float(dense.square().sum(dtype=torch.float64))
        for held_out, name in ((False, "calibration"), (True, "held_out")):
            if wholes[held_out]:
                self.errors[name] = gaps[held_out] / wholes[held_out]

    def _move(self, stream: Stream, rows: slice, output: torch.Tensor) -> None:
        self.walk.store(stream, rows, output, self.name)
        self._moved.add((stream, rows.start))
