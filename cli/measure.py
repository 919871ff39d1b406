"""`eval`, `generate` and `bench`: how good a checkpoint is, what it says, how fast it says it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rewright.cli import console
from rewright.cli.build import command
from rewright.cli.console import table
from rewright.cli.report import bench_rows, eval_head, eval_rows
from rewright.passes.context import RunOptions
from rewright.passes.errors import InputError, UsageError

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="checkpoint folder")]
_PROMPT, _SAMPLE = "Once upon a time", 100


@contextlib.contextmanager
def _kernels(run: RunOptions) -> Iterator[None]:
    """Hold `--kernels` for a command that runs no pipeline; `auto` leaves the environment's switch alone."""
    from rewright.kernels import dispatch

    with dispatch.use(run.kernels) if run.kernels != "auto" else contextlib.nullcontext():
        yield


def _talk(run: RunOptions) -> console.Console:
    talk = console.current()
    talk.configure(quiet=run.quiet, verbose=run.verbose, events=run.events)
    return talk


def evaluate(
    model: Model,
    run: RunOptions,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="text to score: .txt or .jsonl, `-` for stdin")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="multiple-choice questions, JSON lines as ARC or HellaSwag")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="score this one too, on the same targets: KL and agreement")
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(metavar="N", min=2, help="tokens a window, the start token included")
    ] = 256,
    per_document: Annotated[
        str, typer.Option(metavar="auto|first|all", help="windows of a document that are scored")
    ] = "auto",
    sample: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="also let each model go on for N tokens, greedily")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="what they go on from")] = None,
) -> None:
    """Score a model on text: perplexity per scored token, bits per byte; on questions: accuracy.

    With --compare both are scored on the same tokens, and divergence and agreement are added. Every window starts
    as the tokenizer starts a text; the JSON states windows, stride, start token and scored tokens.

    Example: rewright eval out --text heldout.txt --compare model --sample 80
    """
    from rewright.passes.evaluate import evaluate as score

    if text is None and choices is None:
        raise UsageError("nothing to score", hint="give `--text FILE` or `--choices FILE`")
    if per_document not in ("auto", "first", "all"):
        raise UsageError(f"`--per-document` must be one of auto, first, all, not `{per_document}`")
    talk = _talk(run)
    began = time.monotonic()
    with _kernels(run):
        scores = score(
            model,
            text=text,
            choices=choices,
            compare=compare,
            sequence_length=sequence_length,
            per_document=per_document,
            device=run.device,
            dtype=run.dtype,
            threads=run.threads,
            reporter=talk,
        )
        spent = time.monotonic() - began
        paths = [path for path in (compare, model) if path is not None]
        document: dict[str, Any] = {"model": str(model), **scores, "seconds": round(spent, 3)}
        document["checkpoints"] = {str(path): _stored(path) for path in paths}
        if sample is not None or prompt is not None:
            document["sample"] = _stories(paths, prompt or _PROMPT, sample or _SAMPLE, run)
    if run.json:
        console.write_json(document)
        return
    console.write(table(eval_rows(document, model, compare), head=eval_head(model, compare)))
    for path, story in document.get("sample", {}).get("texts", {}).items():
        console.write(f"\n{console.safe(path)}:\n{console.safe(document['sample']['prompt'] + story)}")


def _stored(path: Path) -> dict[str, Any]:
    """What a checkpoint takes on disk, and what it took to make."""
    from rewright.passes.summary import summary

    found = summary(path)
    made = [stage["seconds"] for stage in found["stages"] if stage.get("seconds") is not None]
    return {
        "bytes": found["file_bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "seconds_to_make": round(sum(made), 3) if made else None,
    }


def _stories(paths: list[Path], prompt: str, tokens: int, run: RunOptions) -> dict[str, Any]:
    from rewright.passes.generate import generate as continued

    settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.0, "top_p": 1.0, "seed": run.seed}
    settings |= {"device": run.device, "dtype": run.dtype, "threads": run.threads}
    return {"prompt": prompt, "texts": {str(path): "".join(continued(path, prompt, **settings)) for path in paths}}


def generate(
    model: Model,
    run: RunOptions,
    prompt: Annotated[str, typer.Option(metavar="TEXT|-", help="what to go on from, `-` for stdin")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="stop after this many tokens")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="1 samples as the model was trained, 0 takes the likeliest")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="draw from the likeliest tokens that hold this share")
    ] = 1.0,
) -> None:
    """Let a model go on from a prompt. The text streams to stdout as it comes; the prompt is not repeated.

    Example: rewright generate out --prompt "Once upon a time" --max-new-tokens 100 --temperature 0.8
    """
    from rewright.passes.generate import generate as continued

    _talk(run)
    asked = _prompt(prompt)
    began = time.monotonic()
    pieces: list[str] = []
    with _kernels(run):
        for piece in continued(
            model,
            asked,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=run.seed,
            device=run.device,
            dtype=run.dtype,
            threads=run.threads,
        ):
            pieces.append(piece)
            if not run.json:
                console.write(piece, end="")
    if run.json:
        spent = round(time.monotonic() - began, 3)
        console.write_json({"model": model, "prompt": asked, "text": "".join(pieces), "seconds": spent})
    elif not "".join(pieces).endswith("\n"):
        console.write("")


def _prompt(word: str) -> str:
    if word != "-":
        return word
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8: byte {error.start}") from None


def bench(
    model: Model,
    run: RunOptions,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="tokens of the prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="tokens decoded after it")] = 64,
) -> None:
    """Time a model: prefill and decoding in tokens a second, and the memory it takes.

    Example: rewright bench out --prompt-tokens 256 --new-tokens 64 --json
    """
    from rewright.passes.generate import bench as timed

    _talk(run)
    with _kernels(run):
        found = timed(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            device=run.device,
            dtype=run.dtype,
            threads=run.threads,
        )
    if run.json:
        console.write_json({"model": model, **found})
    else:
        console.write(table(bench_rows(found)))


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    shared = ("device", "dtype", "kernels", "threads", "json", "events", "quiet", "verbose")
    for name, function in (("eval", evaluate), ("generate", generate)):
        command(app, name, run=("seed", *shared), rich_help_panel="Measure")(function)
    command(app, "bench", run=shared, rich_help_panel="Measure")(bench)
