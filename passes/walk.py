"""A walk through a model's decoder layers, one layer in memory at a time.

Hidden states of a set of token rows go through the layers in one or two streams: `dense` with the layers as they
are stored, `compressed` with whatever weights the caller has put in their place. A caller sees the linear layers,
what goes into them and comes out of them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from rewright.passes.chunks import batches, chunks
from rewright.passes.errors import BoundError
from rewright.passes.finite import all_finite
from rewright.passes.layer import Layer, Part, Stopped, Stream
from rewright.passes.loading import Assembly
from rewright.passes.machine import give_back
from rewright.passes.models.prompted import Front
from rewright.passes.world import World

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Hidden states past this size are kept in a file, where the system can page them.
IN_MEMORY_BYTES = 1 << 30


class Walk:
    """Iterate to get one `Layer` after the other, its weights in memory until the next is asked for.

    `tokens` (rows, length) int64. The compressed stream carries every row, the dense one those from `dense_from`
    on (None: none). Rows from `samples` on are held out. A `resident` walk has the whole model in memory. Without
    `through` rows that no dense ones stand beside go no further than into the last layer. Of several processes in a
    `world` each carries some runs of rows. A `prompt` of embeddings stands in front of every row, and its hidden
    states before the row's. Raises InputError for what the checkpoint lacks, BoundError when a layer's output is not
    finite.
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
        through: bool = True,
        world: World | None = None,
        prompt: Front | None = None,
    ) -> None:
        self.assembly, self.prompt = assembly, prompt
        self.world = world or World()
        self.resident, self.through = resident, through
        self.tokens = tokens
        self.samples = len(tokens) if samples is None else samples
        self.dense_from = len(tokens) if dense_from is None else dense_from
        self.prefix = assembly.weights.family.layers if assembly.weights.family else ""
        self._returns_tuple = False
        self._calls: dict[int, list[Call]] = {}
        self._hidden: dict[str, torch.Tensor] = {}
        self._scratch = scratch
        # as many of the calibration's rows as are held out, for errors to compare
        self.sampled = min(self.samples, max(len(tokens) - self.samples, 1)) if self.dense_from < len(tokens) else 0
        self._share(batches(len(tokens), tokens.shape[1], (self.sampled, self.dense_from, self.samples)))

    def _share(self, every: list[slice]) -> None:
        """Take this process's runs of batches; `first` and `stop` are the rows that it carries."""
        runs = chunks(every)
        own = self.world.share(
            [sum((rows.stop - rows.start) * len(self.streams(rows)) for rows in run) for run in runs]
        )
        self.batches = [rows for number in own for rows in runs[number]]
        self._chunk = {rows.start: number for number in own for rows in runs[number]}
        self.first = self.batches[0].start if self.batches else len(self.tokens)
        self.stop = self.batches[-1].stop if self.batches else len(self.tokens)

    def chunk(self, rows: slice) -> int:
        """The run of batches, of all that there are, which a batch belongs to."""
        return self._chunk[rows.start]

    def part(self, rows: slice) -> Part:
        """What the rows of a batch are for."""
        if rows.start >= self.samples:
            return "held_out"
        return "sampled" if rows.stop <= self.sampled else "rest"

    def streams(self, rows: slice) -> tuple[Stream, ...]:
        """The streams that carry these rows."""
        return ("dense", "compressed") if rows.start >= self.dense_from else ("compressed",)

    def __iter__(self) -> Iterator[Layer]:
        if self.resident:
            self.assembly.place()
        for index in range(len(self.assembly.layers)):
            name = f"{self.prefix}.{index}"
            self.assembly.place(name)
            if index == 0:
                self._embed()
                self._leave_embedding()
            layer = Layer(self, index, name)
            yield layer
            layer.finish()
            if not self.resident:
                self.assembly.release(name)
                self._leave_embedding()
                # what a layer leaves on the heap in pieces too small for the next would add up
                give_back()

    def _leave_embedding(self) -> None:
        """Free the largest of what stands before the layers, until tokens are embedded again."""
        if not self.resident:
            self.assembly.release_module(self.assembly.model.get_input_embeddings())

    def _embed(self) -> None:
        """Run everything before the first layer."""
        self._learn_return_form()
        self._calls[1] = self._capture(slice(0, 1))[1]
        for rows in self.batches:
            first, calls = self._capture(rows)
            self._calls.setdefault(rows.stop - rows.start, calls)
            for stream in self.streams(rows):
                if stream not in self._hidden:
                    self._hidden[stream] = self._buffer(stream, first)
                self.hidden(stream, rows).copy_(first)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Room for the hidden states of a stream; for `next` as well, where the dense ones go when they move on."""
        count = self.stop - self._before(name)
        shape = (count, *like.shape[1:])
        size = count * like[0].numel()
        if self._scratch is None or size * like.element_size() <= IN_MEMORY_BYTES:
            return torch.empty(shape, dtype=like.dtype)
        path = self._scratch / f"hidden-{name}.bin"
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    def _place_before(self) -> None:
        """Have what a forward needs beside the layers, up to the head."""
        self.assembly.place(without=(self.prefix, "lm_head", "embed_out"))

    def _learn_return_form(self) -> None:
        """Layers of some families return a tensor, of others a tuple; a stand-in must do the same."""
        forward = self.assembly.layers[0].forward

        def look(*args: Any, **kwargs: Any) -> None:
            self._returns_tuple = isinstance(forward(*args, **kwargs), tuple)
            raise Stopped

        self._run_base(slice(0, 1), {0: look})

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
                raise Stopped
            return (hidden,) if self._returns_tuple else hidden

        self._run_base(rows, dict.fromkeys(range(last + 1), stand_in))
        return first[0], seen

    def _run_base(self, rows: slice, instead: dict[int, Callable[..., Any]]) -> None:
        """The model without its head, with some layers' forwards replaced."""
        self._place_before()
        layers = self.assembly.layers
        for index, forward in instead.items():
            layers[index].forward = forward  # taken back below
        try:
            with torch.no_grad():
                self.assembly.model.base_model(**self._given(rows), use_cache=False)
        except Stopped:
            pass
        finally:
            for index in instead:
                del layers[index].forward

    def _given(self, rows: slice | torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model reads for some rows."""
        tokens = self.tokens[rows].to(self.assembly.device)
        if self.prompt is None:
            return {"input_ids": tokens}
        return {"inputs_embeds": self.prompt.before(self.assembly.model, tokens)}

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

    def _before(self, name: str) -> int:
        """The first row of which this process has a stream's hidden states."""
        return self.first if name == "compressed" else max(self.first, self.dense_from)

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        before = self._before(name)
        return self._hidden[name][rows.start - before : rows.stop - before]

    def store(self, stream: Stream, rows: slice, hidden: torch.Tensor, name: str) -> None:
        """Take a layer's output for a batch: in place, or for the dense stream beside what it came from.

        Raises BoundError if it is not finite.
        """
        if not all_finite(hidden):
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
        return self._hidden[name][rows - self._before(name)]

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
                result: torch.Tensor = self.assembly.model(**self._given(rows), use_cache=False).logits
        finally:
            for index in range(last + 1):
                del self.assembly.layers[index].forward
        return result
