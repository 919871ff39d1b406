"""One decoder layer during a walk: what its matrices meet in either stream, and others put in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from rewright.passes.models.linears import Slot, linears_of, watched

if TYPE_CHECKING:
    from rewright.passes.walk import Walk

Stream = Literal["dense", "compressed"]
Part = Literal["sampled", "rest", "held_out"]


class Stopped(Exception):
    """A forward has come as far as it is wanted."""


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

    `chunk` numbers the run of batches that it belongs to. `seen` maps a linear layer's name within the decoder layer
    to what it met in each stream; layers that are fed one tensor share it. `gaps` holds, for a matrix that writes to
    the residual stream, the difference between the streams (dense less compressed, (tokens, rows)) in what its output
    is added to. `part` tells the calibration's rows on which errors are taken, the rest of them, and the rows past the
    walk's `samples`.
    """

    rows: slice
    part: Part
    chunk: int
    seen: dict[str, dict[Stream, Seen]] = field(default_factory=dict)
    gaps: dict[str, torch.Tensor] = field(default_factory=dict)


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
        return [[tuple(paths) for paths in stage] for stage in self.walk.world.lead(self._stages)]

    def _stages(self) -> list[list[list[str]]]:
        order: dict[int | str, dict[int, list[str]]] = {}
        held: list[torch.Tensor] = []

        def note(path: str, inputs: torch.Tensor, outputs: torch.Tensor | None) -> None:
            # the tensor is kept alive, so that its id stays its own
            held.append(inputs)
            stage = order.setdefault(self.linears[path].stage or id(inputs), {})
            stage.setdefault(id(inputs), []).append(path)

        with watched(self.linears, note), torch.no_grad():
            self.walk.run_layer(self.index, self.walk.hidden("compressed", slice(0, 1)))
        return [list(groups.values()) for groups in order.values()]

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
            batch = Batch(rows, self.walk.part(rows), self.walk.chunk(rows))
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
        ends = not self.walk.through and self.index == len(self.walk.assembly.layers) - 1
        for rows in self.walk.batches:
            streams = self.walk.streams(rows)
            if ends and "dense" not in streams:
                continue
            if stream in streams and (stream, rows.start) not in self._moved:
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
                raise Stopped

        with watched({path: self.linears[path] for path in paths}, note, outputs=outputs):
            try:
                with torch.no_grad():
                    output = self.walk.run_layer(self.index, self.walk.hidden(stream, rows))
            except Stopped:
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
        found: list[tuple[bool, float, float]] = []
        for rows in self.walk.batches:
            if "dense" in self.walk.streams(rows):
                dense, ours = (self.walk.hidden(stream, rows).float() for stream in ("dense", "compressed"))
                gap = float((ours - dense).square_().sum(dtype=torch.float64))
                whole = float(dense.square().sum(dtype=torch.float64))
                found.append((self.walk.part(rows) == "held_out", gap, whole))
        every = [batch for theirs in self.walk.world.together(found) for batch in theirs]
        for held_out, name in ((False, "calibration"), (True, "held_out")):
            gaps = sum(gap for part, gap, _ in every if part == held_out)
            wholes = sum(whole for part, _, whole in every if part == held_out)
            if wholes:
                self.errors[name] = gaps / wholes

    def _move(self, stream: Stream, rows: slice, output: torch.Tensor) -> None:
        self.walk.store(stream, rows, output, self.name)
        self._moved.add((stream, rows.start))
