"""A model whose decode steps read only what its attached predictors let through, and whose prefill is dense.

`attach` puts these modules in place of a transformers model's own; the model is called as before. A step of one token a
row, up to `ROWS` rows, after something that stands in the cache, is sparse. Keys and values are written for every head.
For scoring a text at once, `Flow.scored` makes every token past a row's first few choose as it would when decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rewright.formats.dejavu import Attached
from rewright.kernels.predictor_in import predictor_in
from rewright.kernels.predictor_out import active_neurons, predictor_out
from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.sparse_mlp import break_even, sparse_mlp, worth_asking
from rewright.kernels.thresholded_linear import thresholded_linear
from rewright.passes.errors import InputError
from rewright.passes.models.activations import activate
from rewright.passes.models.families import family_of
from rewright.passes.models.sites import Shape, Site, shape_of

# Rows that a sparse step takes at most.
ROWS = 16
# Weights of an MLP's last matrix below which a CPU is done with all of them before a predictor is asked. Measured by
# `python -m tests.bench.sparse_widths`, see docs/results/sparse-widths.md.
SMALLEST = 1 << 21

# What chooses in place of the predictors: given a site's numbers [tokens, units], which of them are read.
Chooser = Callable[["Choice"], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """What there is to choose from at a place: `site` of `layer`, `values` [tokens, units] as the dense model has them.

    Units are neurons, columns or groups of heads, each of `unit_bytes`; `own` [tokens, units] is what the attached
    predictors let through.
    """

    layer: int
    site: str
    values: torch.Tensor
    own: torch.Tensor
    unit_bytes: int


@dataclass(slots=True)
class Flow:
    """The forward under way: how many tokens a row, and whether they are decoded, which they are not while it rests.

    `prefix` is None, or scoring is on and so many first tokens of every row are dense. `choose` stands in for the
    predictors then, and `note` hears of every choice made; `masks` has what was chosen for all matrices of a site.
    """

    shape: Shape
    length: int = 0
    decodes: bool = False
    resting: bool = False
    prefix: int | None = None
    choose: Chooser | None = None
    note: Callable[[Choice, torch.Tensor], None] | None = None
    masks: dict[tuple[int, Site], torch.Tensor] = field(default_factory=dict)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model: see what it is."""
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            return
        rows, self.length = given.shape[:2]
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        before = cache is not None and cache.get_seq_length() > 0
        self.decodes = self.length == 1 and rows <= ROWS and bool(before) and not self.resting

    @contextlib.contextmanager
    def scored(self, prefix: int) -> Iterator[None]:
        """Score texts as if their tokens past the first `prefix` of a row were decoded one by one."""
        self.prefix = prefix
        try:
            yield
        finally:
            self.prefix = None

    @contextlib.contextmanager
    def rests(self) -> Iterator[None]:
        """Decode densely for a time."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    @property
    def scores(self) -> bool:
        return self.prefix is not None

    def kept(self, choice: Choice) -> torch.Tensor:
        """Which units are read, [tokens, units], while a text is scored."""
        found = self.choose(choice) if self.choose is not None else choice.own
        assert self.prefix is not None
        place = torch.arange(len(found), device=found.device) % self.length
        found = found | (place < self.prefix)[:, None]
        if self.note is not None:
            self.note(choice, found)
        return found


@dataclass(slots=True)
class Predictor:
    """A layer's predictor of neurons as it runs: A and B in the dtype they are stored in."""

    a: torch.Tensor
    a_scale: torch.Tensor | None
    a0: torch.Tensor
    b: torch.Tensor
    b_scale: torch.Tensor | None
    c: torch.Tensor
    shift: list[float]
    buckets: list[int]
    density: float
    relu: bool = False

    def widen(self) -> Predictor:
        """The same with A and B in float32: a CPU's products are of that, and would make it at every step."""
        a, b = self.a.float(), self.b.float()
        a = a if self.a_scale is None else a * self.a_scale[:, None]
        b = b if self.b_scale is None else b * self.b_scale[:, None]
        return replace(self, a=a, a_scale=None, b=b, b_scale=None)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, neurons], float32."""
        wide = self.widen()
        hidden = torch.addmm(self.a0, x.float(), wide.a.t())
        return torch.addmm(self.c, hidden.clamp_(min=0) if self.relu else hidden, wide.b.t())

    def shift_of(self, rows: int) -> float:
        """What is added to every score for so many rows: that of the next bucket."""
        return next((s for s, bucket in zip(self.shift, self.buckets, strict=True) if rows <= bucket), self.shift[-1])


class SparseMLP(nn.Module):
    """An MLP whose neurons are predicted. Takes the place of the whole of it, [..., width] to [..., width].

    The last matrix is held by neurons, `down` [neurons, width], and serves the dense product as it is. `reads` is what
    the predictor is given where that is not what the MLP is given.
    """

    def __init__(
        self, flow: Flow, layer: int, first: nn.Linear, up: nn.Linear | None, last: nn.Linear, held: Predictor
    ) -> None:
        super().__init__()
        self.flow, self.layer, self.held = flow, layer, held
        self.first, self.up = first, up
        self.down = nn.Parameter(last.weight.detach().t().contiguous(), requires_grad=False)
        self.down_bias = last.bias
        self.reads: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.flow.decodes and not self.flow.scores and self.pays:
            return self._decoded(flat).view(x.shape)
        made = self._hidden(flat)
        if self.flow.scores:
            own = self.held.scores(self._read(flat)) > 0
            size = self.flow.shape.row_weights(neuron=True) * self.down.element_size()
            made = made * self.flow.kept(Choice(self.layer, "mlp", made, own, size))
        return self._last(made).view(x.shape)

    def _read(self, flat: torch.Tensor) -> torch.Tensor:
        return flat if self.reads is None else self.reads.reshape(flat.shape)

    def _hidden(self, flat: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.first(flat)
        if self.up is None:
            return activate(self.flow.shape.activation, first)
        return activate(self.flow.shape.activation, self.up(flat), first)

    def _last(self, made: torch.Tensor) -> torch.Tensor:
        return made @ self.down if self.down_bias is None else torch.addmm(self.down_bias, made, self.down)

    @property
    def pays(self) -> bool:
        """Whether asking the predictor is worth its time: on a CPU not for a small MLP, nor for a dense layer."""
        if self.down.device.type != "cpu":
            return True
        return self.down.numel() >= SMALLEST and self.held.density <= worth_asking(1)

    def _decoded(self, flat: torch.Tensor) -> torch.Tensor:
        held = self.held
        hidden = predictor_in(self._read(flat), held.a, held.a0, a_scale=held.a_scale)
        if held.relu:
            hidden.clamp_(min=0)
        shift, count = held.shift_of(len(flat)), None
        if flat.device.type == "cpu":
            index = active_neurons(hidden, held.b, held.c, shift, b_scale=held.b_scale)
            if len(index) > break_even(len(flat)) * len(self.down):
                return self._last(self._hidden(flat))
        else:
            # a GPU's step never waits to be told how many there are
            index, count = predictor_out(hidden, held.b, held.c, shift, b_scale=held.b_scale)
        main, gate = (self.first, None) if self.up is None else (self.up, self.first)
        partial = sparse_mlp(
            flat,
            main.weight,
            self.down,
            main.bias,
            index,
            count,
            self.flow.shape.activation,
            gate=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
        )
        return reduce_add(partial, self.down_bias, None, flat.dtype)


class SparseInputs(nn.Module):
    """A matrix of whose input only numbers past their thresholds are multiplied: [..., columns] to [..., rows].

    Of the matrices of one site one `leads`: while a text is scored it chooses for all of them.
    """

    threshold: torch.Tensor

    def __init__(
        self, flow: Flow, layer: int, site: Site, linear: nn.Linear, threshold: torch.Tensor, *, leads: bool
    ) -> None:
        super().__init__()
        self.flow, self.layer, self.site, self.leads = flow, layer, site, leads
        self.columns = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("threshold", threshold, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.flow.decodes and not self.flow.scores:
            return self._decoded(flat).view(*x.shape[:-1], -1)
        if self.flow.scores:
            place = self.layer, self.site
            if self.leads:
                size = self.flow.shape.rows(self.site) * self.columns.element_size()
                choice = Choice(*place, flat, flat.abs() > self.threshold, size)
                self.flow.masks[place] = self.flow.kept(choice)
            flat = flat * self.flow.masks[place]
        return self._product(flat).view(*x.shape[:-1], -1)

    def _product(self, flat: torch.Tensor) -> torch.Tensor:
        return flat @ self.columns if self.bias is None else torch.addmm(self.bias, flat, self.columns)

    def _decoded(self, flat: torch.Tensor) -> torch.Tensor:
        """What is past its threshold in any of the rows counts for all of them."""
        partial = thresholded_linear(flat, self.columns, self.threshold)
        return reduce_add(partial, self.bias, None, flat.dtype)


@dataclass(slots=True)
class Router:
    """A layer's router of groups of heads; `selected` is what the last forward chose, [tokens, groups]."""

    flow: Flow
    layer: int
    weight: torch.Tensor
    bias: torch.Tensor
    selected: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def look(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before the attention's first matrix: choose by what it is fed."""
        flat = args[0].reshape(-1, args[0].shape[-1])
        self.selected = torch.addmm(self.bias, flat.float(), self.weight.t()) > 0


class RoutedOutput(nn.Module):
    """The attention's last matrix, fed by the groups of heads that a router lets through."""

    def __init__(self, router: Router, linear: nn.Module) -> None:
        super().__init__()
        self.router, self.linear = router, linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flow, router = self.router.flow, self.router
        if not (flow.scores or flow.decodes):
            return self.linear(x)  # type: ignore[no-any-return]  # a module's call is untyped
        shape = flow.shape
        parts = x.reshape(-1, shape.groups, shape.group_width)
        kept = router.selected
        if flow.scores:
            size = shape.row_weights(neuron=False) * x.element_size()
            kept = flow.kept(Choice(router.layer, "heads", parts.float().norm(dim=-1), kept, size))
        return self.linear((parts * kept[:, :, None]).view(x.shape))  # type: ignore[no-any-return]  # as above


def attach(model: Any, found: Attached) -> Flow:
    """Make a transformers model decode sparsely, by what is attached to its checkpoint; its flow.

    Raises InputError for tensors that are missing or of another shape.
    """
    config = model.config.to_dict()
    shape, reader = shape_of(config), _Reader(found)
    flow = Flow(shape)
    layers = model.get_submodule(family_of(config).layers)
    for index, layer in enumerate(layers):
        if "mlp" in found.config["targets"]:
            _put_mlp(flow, index, layer, reader, model.device)
        for site in shape.covered(tuple(found.config["targets"]))["inputs"]:
            threshold = reader.read(index, f"{site}.threshold", (shape.columns(site),)).to(model.device)
            for place, name in enumerate(shape.members(site)):
                made = SparseInputs(flow, index, site, _linear(layer, name), threshold, leads=place == 0)
                layer.set_submodule(name, made)
        # after the matrix that it listens at has its last form
        if "heads" in found.config["targets"]:
            weight, bias = (
                reader.read(index, "attn.W", (shape.groups, shape.width)),
                reader.read(index, "attn.b", (shape.groups,)),
            )
            router = Router(flow, index, weight.to(model.device), bias.to(model.device))
            layer.get_submodule(shape.members("attn_in")[0]).register_forward_pre_hook(router.look)
            layer.set_submodule(shape.places.out, RoutedOutput(router, layer.get_submodule(shape.places.out)))
    model.register_forward_pre_hook(flow.begin, with_kwargs=True)
    model.sparsity = flow
    return flow


def flow_of(model: Any) -> Flow | None:
    """The flow of a model that decodes sparsely, or that a prompt stands in front of; None for any other."""
    found = getattr(getattr(model, "inner", model), "sparsity", None)
    return found if isinstance(found, Flow) else None


def set_level(model: Any, found: Attached, level: int) -> None:
    """Make a model with predictors take the thresholds of one of the ladder's budgets."""
    reader = _Reader(found)
    levels = len(found.config["levels"])
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.held.c = reader.read(module.layer, "mlp.ladder", (levels, len(module.held.c)))[level].to(
                model.device
            )
        elif isinstance(module, SparseInputs):
            whole = reader.read(module.layer, f"{module.site}.threshold", (len(module.threshold),))
            factor = reader.read(module.layer, f"{module.site}.ladder", (levels,))[level]
            module.threshold = (whole * factor).to(model.device)
        elif isinstance(module, RoutedOutput):
            router = module.router
            router.bias = reader.read(router.layer, "attn.ladder", (levels, len(router.bias)))[level].to(model.device)


def sensitivities(found: Attached) -> dict[tuple[int, str], torch.Tensor]:
    """By layer and the place that chooses, how much the square of each unit matters, where the attachment tells."""
    told: dict[tuple[int, str], torch.Tensor] = {}
    for name in found.source.entries:
        words = name.split(".")
        if len(words) == 4 and words[0] == "layers" and words[3] == "weight" and words[1].isdecimal():
            told[int(words[1]), words[2]] = found.source.read(name)
    return told


class _Reader:
    """Tensors of an attachment, checked."""

    def __init__(self, found: Attached) -> None:
        self.found = found

    def has(self, layer: int, leaf: str) -> bool:
        return f"layers.{layer}.{leaf}" in self.found.source.entries

    def read(self, layer: int, leaf: str, shape: Sequence[int | None]) -> torch.Tensor:
        """A tensor of a layer; None stands for any length. Raises InputError."""
        name, path = f"layers.{layer}.{leaf}", self.found.source.path
        entry = self.found.source.entries.get(name)
        if entry is None:
            raise InputError(f"`{path}` has no tensor `{name}`")
        wanted = [had if asked is None else asked for asked, had in zip(shape, entry.shape, strict=False)]
        if len(entry.shape) != len(shape) or list(entry.shape) != wanted:
            raise InputError(f"`{name}` in `{path}` is {list(entry.shape)}, and the model takes another shape")
        return self.found.source.read(name)


def _put_mlp(flow: Flow, index: int, layer: nn.Module, reader: _Reader, device: torch.device) -> None:
    shape, places, config = flow.shape, flow.shape.places, reader.found.config
    buckets = [int(rows) for rows in config["buckets"]]
    a = reader.read(index, "mlp.A", (None, shape.width))
    rank, whole = len(a), reader.has(index, "mlp.A_scale")
    held = Predictor(
        a.to(device),
        reader.read(index, "mlp.A_scale", (rank,)).to(device) if whole else None,
        reader.read(index, "mlp.a0", (rank,)).to(device),
        reader.read(index, "mlp.B", (shape.neurons, rank)).to(device),
        reader.read(index, "mlp.B_scale", (shape.neurons,)).to(device) if whole else None,
        reader.read(index, "mlp.c", (shape.neurons,)).to(device),
        reader.read(index, "mlp.bucket_shift", (len(buckets),)).tolist(),
        buckets,
        float(config["densities"][index]),
        index in config.get("relu", ()),
    )
    made = SparseMLP(
        flow,
        index,
        _linear(layer, places.gate or places.up),
        _linear(layer, places.up) if places.gate else None,
        _linear(layer, places.down),
        held.widen() if device.type == "cpu" else held,
    )
    if config.get("input") == "block_in":

        def look(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            made.reads = args[0] if args else kwargs["hidden_states"]

        layer.register_forward_pre_hook(look, with_kwargs=True)
    if places.gate:
        layer.set_submodule(places.down.rpartition(".")[0], made)
        return
    # OPT calls its matrices and the activation itself
    layer.set_submodule(places.up, made)
    layer.set_submodule(places.down, nn.Identity())
    layer.activation_fn = nn.Identity()


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
