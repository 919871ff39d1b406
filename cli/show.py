"""`show`, `diff` and `verify`: what a checkpoint holds, how two differ, whether one is sound."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rewright.cli import console
from rewright.cli.build import command
from rewright.cli.console import table
from rewright.cli.figures import duration, figure, size
from rewright.cli.policy import policy_tables
from rewright.passes.errors import InputError, UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import fields_of

Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help="checkpoint folder or one .safetensors file")]


def show(
    path: Checkpoint,
    run: RunOptions,
    as_: Annotated[
        str | None, typer.Option("--as", metavar="chain|toml", help="print the stages that made it, to run again")
    ] = None,
    count: Annotated[
        bool | None,
        typer.Option(
            "--count/--no-count",
            help="count the zeros of matrices, or do not; by default where that takes seconds",
        ),
    ] = None,
) -> None:
    """Show what a checkpoint holds: files, tensors by kind, zeros, bits a weight, and what made it.

    Example: rewright show out --as toml > recipe.toml
    """
    if as_ is not None:
        _again(path, as_)
        return
    from rewright.passes.summary import summary

    found = summary(path, count)
    if run.json:
        console.write_json(found)
        return
    for warning in found["warnings"]:
        console.current().warn(warning)
    console.write(table(_facts(found)))
    console.write("")
    console.write(table(_kinds(found["kinds"]), head=("kind", "tensors", "parameters", "bytes", "bits a weight")))
    if found["matrices"]:
        console.write("")
        head = ("matrices of layers", "count", "weights", "zeros", "bytes", "bits a weight")
        console.write(table(_matrices(found["matrices"]), head=head))
    console.write("")
    console.write(table(_takes(found["takes"], found["tensor_bytes"]), head=("on disk", "bytes", "share")))
    if found["policy"]:
        console.write("\nplacement policy")
        for lines in policy_tables(found["policy"]):
            console.write(lines)
    if found["stages"]:
        console.write("\nmade by")
        console.write(table(_stages(found["stages"])))


def _again(path: Path, form: str) -> None:
    from rewright.passes import recipe
    from rewright.passes.summary import stamp_of

    if form not in ("chain", "toml"):
        raise UsageError(f"`--as` must be chain or toml, not `{form}`")
    stamp = stamp_of(path)
    if stamp is None:
        raise InputError(f"`{path}` has no `rewright.json`: nothing here says what made it")
    stages = recipe.stages_of_stamp(stamp)
    if said := _run_words(stamp):
        console.current().info(f"made with {said}, which a recipe does not hold")
    console.write(shlex.join(recipe.words(stages)) + "\n" if form == "chain" else recipe.dump(stages), end="")


def _run_words(stamp: Mapping[str, Any]) -> str:
    """The run options that decided the result, where they are not the defaults."""
    made = stamp.get("run")
    said = made if isinstance(made, Mapping) else {}
    return " ".join(
        f"--{item.flag} {said[item.flag]}"
        for item in fields_of(RunOptions)
        if item.opt.affects == "result" and said.get(item.flag, item.default) != item.default
    )


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "path", found["path"]
    yield "model", found["model_type"] or "unknown"
    yield "files", f"{len(found['files'])} of weights, {size(found['file_bytes'])}"
    yield "tensors", f"{found['tensors']}, {size(found['tensor_bytes'])}"
    yield "parameters", f"{found['parameters']:,}"
    yield "bits a weight", figure(found["bits_per_weight"])
    rows, words = found["embedding_rows"], found["tokenizer_rows"]
    if rows is not None or words is not None:
        yield "vocabulary", f"embedding {figure(rows)} rows, tokenizer {figure(words)}"
    if found["quantization"]:
        yield "quantised", _quantised(found["quantization"])
    if found["prompt"]:
        prompt = found["prompt"]
        cost = f"{size(prompt['cache_bytes_16_bit'])} of 16-bit keys and values a request"
        yield "prompt", f"{prompt['tokens']} tokens, {prompt['learned'] or 'of unknown origin'}; {cost}"
    if found["predictors"]:
        told = found["predictors"]
        share = f"{100 * told['share']:.1f} % of their rows a token, {size(told['read_bytes'])} to choose them"
        yield "read sparsely", f"{', '.join(told['targets'])} by {told['method']}: {share}"
    if found["unknown"]:
        yield "unknown", f"{len(found['unknown'])} tensors that no family names: {', '.join(found['unknown'][:4])}"


def _quantised(facts: Mapping[str, Any]) -> str:
    kinds = []
    for scheme in facts["schemes"]:
        scale = f"groups of {scheme['group_size']}" if scheme["group_size"] else "one scale a row"
        zero = "" if scheme["symmetric"] else ", asymmetric"
        kept = f", {scheme['nnz']} of which are kept" if scheme["nnz"] else ""
        kinds.append(f"{scheme['matrices']} at {scheme['bits']} bits, {scale}{kept}{zero}")
    return f"{facts['method']}: {'; '.join(kinds)}" if kinds else str(facts["method"])


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for kind, counts in kinds.items():
        bits = figure(counts["bits_per_weight"])
        yield kind, str(counts["tensors"]), f"{counts['parameters']:,}", size(counts["bytes"]), bits


def _matrices(matrices: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, kind in matrices.items():
        zeros = "not counted" if kind["sparsity"] is None else f"{100 * kind['sparsity']:.2f} %"
        bits = figure(kind["bits_per_weight"])
        yield name, str(kind["matrices"]), f"{kind['weights']:,}", zeros, size(kind["bytes"]), bits


# What stands for each part in the table; parts that take nothing are left out.
_PARTS = {
    "codes": "codes",
    "masks": "masks",
    "scales": "scales, zero points and shapes",
    "dense": "matrices that are not packed",
    "embedding": "embedding",
    "head": "head",
    "rest": "norms, biases and others",
}


def _takes(parts: Mapping[str, int], whole: int) -> Iterator[tuple[str, ...]]:
    for part, label in _PARTS.items():
        if parts[part]:
            yield label, size(parts[part]), f"{100 * parts[part] / whole:.3g} %"


def _stages(stages: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for number, stage in enumerate(stages, start=1):
        spent = duration(stage["seconds"]) if stage.get("seconds") is not None else "-"
        options = [f"{key} {_item(value)}" for key, value in (stage.get("options") or {}).items() if value]
        yield f"  {number}", str(stage.get("pass")), spent, ", ".join(options)


def _item(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else figure(value)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="checkpoint folder or one .safetensors file")],
    b: Annotated[Path, typer.Argument(metavar="B", help="the other")],
    run: RunOptions,
) -> None:
    """Compare two checkpoints: config, tensors, bytes and the files beside them. The exit code is 0 either way.

    Example: rewright diff model out --json
    """
    from rewright.passes.compare import compare

    found = compare(a, b)
    if run.json:
        console.write_json(found)
        return
    if found["equal"]:
        console.write("equal")
        return
    for line in _differences(found):
        console.write(line)


def _differences(found: Mapping[str, Any]) -> Iterator[str]:
    for key, sides in found["config"].items():
        one, other = (_short(sides[side]) if side in sides else "absent" for side in ("a", "b"))
        yield console.safe(f"config {key}: {one} -> {other}")
    for side in ("a", "b"):
        for name in found["tensors"][f"only_{side}"]:
            yield console.safe(f"tensor {name}: only in {side.upper()}")
    changed = found["tensors"]["changed"]
    if changed:
        yield table(
            (
                (
                    item["name"],
                    item["a"],
                    item["b"],
                    figure(item["max_difference"]),
                    figure(item["relative_difference"]),
                )
                for item in changed
            ),
            head=("tensor", "A", "B", "largest difference", "relative"),
        )
    yield f"{found['tensors']['equal']} tensors equal, {len(changed)} changed"
    for name, how in found["sidecars"].items():
        yield console.safe(f"file {name}: {how}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def verify(path: Checkpoint, run: RunOptions) -> None:
    """Check a checkpoint: headers, shards, index, config, and every digest where Rewright stamped it.

    Exit 0 when it is sound, 3 when it is not; each problem is a line on stdout.

    Example: rewright verify out
    """
    from rewright.formats.verify import verify as checked

    with console.current().progress("verify, MB", None) as bar:
        report = checked(path, on_bytes=lambda count: bar.advance(count / 1e6))
    if run.json:
        console.write_json(report.plain())
    else:
        for warning in report.warnings:
            console.current().warn(warning)
        for problem in report.problems:
            console.write(console.safe(problem))
    if not report.ok:
        count = len(report.problems)
        raise InputError(f"`{path}` is not sound: {count} problem{'s' if count > 1 else ''}")
    if not run.json:
        digests = f", {report.digests} digests" if report.digests else ""
        console.write(f"sound: {report.files} files, {report.tensors} tensors, {size(report.nbytes)}{digests}")


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    for name, function in (("show", show), ("diff", diff), ("verify", verify)):
        command(app, name, run=("json",), rich_help_panel="Look")(function)
