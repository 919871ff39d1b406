"""What a pass declares: its options, what it needs and gives, and where its code is.

A spec is data. Commands, recipes, keys and the reference pages are all derived from it, so this module and
every `passes/<pass>/spec.py` import nothing that takes time to load.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rewright.formats.provenance import history

if TYPE_CHECKING:
    from rewright.formats.checkpoint import Checkpoint

Metrics = dict[str, Any]
Want = Literal["weights", "config", "tokenizer", "text"]


@dataclass(frozen=True, slots=True)
class Opt:
    """What an option says beside its type and default; carried in `Annotated[...]`.

    `negative` names the flag that switches a true-by-default option off (`asymmetric` for `symmetric`).
    `affects="speed"` keeps an option out of the key: it changes how fast a result is reached, never the result.
    """

    help: str
    min: float | None = None
    max: float | None = None
    affects: Literal["result", "speed"] = "result"
    negative: str | None = None
    short: str | None = None
    metavar: str | None = None


class Value(Protocol):
    """A small option type with a text form: `parse(str(x)) == x`; `parse` raises ValueError.

    One that stands for a number has it as `number`, and that is its form in JSON and TOML.
    """

    @classmethod
    def parse(cls, text: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Field:
    """One option as every consumer sees it. `type` is a scalar type, a `Literal`, `Path` or a `Value`."""

    name: str
    type: Any
    opt: Opt
    default: Any
    many: bool = False
    optional: bool = False

    @property
    def flag(self) -> str:
        """The word on the command line and in a recipe, without dashes in front."""
        return self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal`, else nothing."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def is_value(self) -> bool:
        return isinstance(self.type, type) and hasattr(self.type, "parse")

    def read(self, raw: Any) -> Any:
        """One item from its plain form: a word, or a recipe's TOML value. Raises ValueError."""
        if self.choices:
            for choice in self.choices:
                if str(choice) == str(raw) and not isinstance(raw, bool):
                    return choice
            raise ValueError(f"must be one of {', '.join(str(c) for c in self.choices)}, not `{raw}`")
        if self.type is Path and raw == "":
            raise ValueError("must not be empty")
        if self.is_value:
            if isinstance(raw, bool | list | dict):
                raise ValueError(f"must be text, not `{raw}`")
            return self.type.parse(str(raw))
        if self.type is bool:
            if isinstance(raw, bool) or raw in ("true", "false"):
                return raw in (True, "true")
            raise ValueError(f"must be true or false, not `{raw}`")
        if self.type in (int, float):
            return self._number(raw)
        if not isinstance(raw, str | Path):
            raise ValueError(f"must be text, not `{raw}`")
        return self.type(raw)

    def _number(self, raw: Any) -> int | float:
        whole = self.type is int
        try:
            if isinstance(raw, bool) or (whole and isinstance(raw, float) and not raw.is_integer()):
                raise ValueError
            value: int | float = self.type(raw)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"must be a {'whole ' if whole else ''}number, not `{raw}`") from None
        self.check(value)
        return value

    def check(self, value: float) -> None:
        """Hold a number against the option's bounds. Raises ValueError."""
        low, high = self.opt.min, self.opt.max
        if low is None and high is None:
            if value != value:
                raise ValueError(f"must be a number, not `{value}`")
        elif low is not None and high is not None:
            if not low <= value <= high:
                raise ValueError(f"must be from {_figure(low)} to {_figure(high)}, not `{value}`")
        elif low is not None and not value >= low:
            raise ValueError(f"must be at least {_figure(low)}, not `{value}`")
        elif high is not None and not value <= high:
            raise ValueError(f"must be at most {_figure(high)}, not `{value}`")

    def plain(self, value: Any) -> Any:
        """The JSON and TOML form of one item."""
        if self.is_value and hasattr(value, "number"):
            return value.number
        if self.is_value or isinstance(value, Path):
            return str(value)
        return value


def _figure(bound: float) -> str:
    """A bound as people write it: whole numbers in full."""
    return f"{bound}" if isinstance(bound, int) else f"{bound:g}"


def fields_of(options: type) -> tuple[Field, ...]:
    """The options of a dataclass of `Annotated` fields, in order."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = []
    for item in dataclasses.fields(options):
        base, opt = typing.get_args(hints[item.name])
        many = typing.get_origin(base) is tuple
        if many:
            base = typing.get_args(base)[0]
        optional = isinstance(base, types.UnionType) or typing.get_origin(base) is typing.Union
        if optional:
            (base,) = (arg for arg in typing.get_args(base) if arg is not type(None))
        found.append(Field(item.name, base, opt, item.default, many, optional))
    return tuple(found)


def to_plain(options: Any, *, affects: Literal["result", "speed"] | None = None) -> dict[str, Any]:
    """Options as JSON values by flag; with `affects` only those of that kind."""
    plain: dict[str, Any] = {}
    for item in fields_of(type(options)):
        if affects is not None and item.opt.affects != affects:
            continue
        value = getattr(options, item.name)
        if item.many:
            plain[item.flag] = [item.plain(one) for one in value]
        else:
            plain[item.flag] = None if value is None else item.plain(value)
    return plain


def from_plain(options: type, plain: Mapping[str, Any]) -> Any:
    """The reverse of `to_plain`; missing options take their defaults, `-` and `_` are one.

    Raises ValueError naming the option: unknown, given twice, of the wrong kind, out of bounds, required and absent.
    """
    known = {item.flag: item for item in fields_of(options)}
    values: dict[str, Any] = {}
    for word, raw in plain.items():
        item = known.get(word.replace("_", "-"))
        if item is None:
            raise ValueError(f"no option `{word}`; there are {', '.join(known)}")
        if item.name in values:
            raise ValueError(f"`{item.flag}` is given twice")
        try:
            if item.many:
                listed = raw if isinstance(raw, list | tuple) else [raw]
                values[item.name] = tuple(item.read(one) for one in listed)
            elif raw is None and item.optional:
                values[item.name] = None
            elif raw is None or isinstance(raw, list | dict):
                raise ValueError(f"takes one value, not `{raw}`")
            else:
                values[item.name] = item.read(raw)
        except ValueError as error:
            raise ValueError(f"`{item.flag}` {error}") from None
    for item in known.values():
        if item.required and item.name not in values:
            raise ValueError(f"`{item.flag}` is required")
    return options(**values)


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint as its headers tell it: `tensors` maps a name to (safetensors dtype, shape).

    `made` are the stages that are known to have made it, oldest first, as stamps record them; those still to run have
    no metrics.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    made: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, source: Checkpoint) -> Layout:
        """The layout of an opened checkpoint; a bare file has an empty config."""
        tensors = {name: (entry.dtype, entry.shape) for name, entry in source.entries.items()}
        return cls(tensors, source.config or {}, history(source.stamp))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a stage would cost, from headers alone; bytes and floating-point operations.

    `layout` is the checkpoint the stage would write, from which the next stage is estimated; `details` is the
    pass's own table for `--dry-run`, JSON values only.
    """

    layout: Layout
    output_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int
    flops: int
    bytes_moved: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A pass. `impl` is `module:function`, imported only when the pass runs.

    `version` rises when equal options may give other bytes. `wants` says what the source must have, and `text` that an
    option must name one; `spares` which of those a run with these options does without. `grain` is the most that a
    resume can lose; `archs` the `model_type` values it takes, empty for any; `metrics` the numbers it reports, by
    which a bound on another is refused before any work (None: not said); `splits` tells whether several processes
    share the work under these options, which the first of them does alone otherwise.
    """

    name: str
    summary: str
    version: int
    options: type
    impl: str
    wants: frozenset[Want]
    gives: Literal["weights", "attachment", "report"]
    grain: Literal["tensor", "layer", "step"]
    paper: str
    estimate: Callable[[Any, Layout], Estimate]
    archs: frozenset[str] = frozenset()
    metrics: frozenset[str] | None = None
    attachment: str | None = None
    spares: Callable[[Any], frozenset[Want]] = lambda options: frozenset()
    splits: Callable[[Any], bool] = lambda options: False

    def needs(self, options: Any) -> frozenset[Want]:
        """What of `wants` a run with these options cannot do without."""
        return self.wants - self.spares(options)

    def load(self) -> Callable[..., Metrics]:
        """The function that does the work: `run(context, options, source, draft) -> metrics`."""
        module, _, name = self.impl.partition(":")
        function: Callable[..., Metrics] = getattr(importlib.import_module(module), name)
        return function
