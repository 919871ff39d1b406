"""`eval`, `generate` and `bench`: how good a checkpoint is, what it says, how fast it says it."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from rewright.cli import console
from rewright.cli.against import against
from rewright.cli.arms import arms
from rewright.cli.build import command
from rewright.cli.calibrate import calibrate
from rewright.cli.console import table
from rewright.cli.report import bench_rows, eval_head, eval_rows
from rewright.passes import world
from rewright.passes.errors import InputError, UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Opt
from rewright.passes.values import Method, Methods

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="checkpoint folder")]
_PROMPT, _SAMPLE = "Once upon a time", 100


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What `eval` scores, and how."""

    text: Annotated[Path | None, Opt("text to score: .txt or .jsonl, `-` for stdin", metavar="FILE")] = None
    choices: Annotated[
        Path | None, Opt("multiple-choice questions, JSON lines as ARC or HellaSwag", metavar="FILE")
    ] = None
    compare: Annotated[
        Path | None, Opt("score this one too, on the same targets: ratio, KL, agreement", metavar="OTHER")
    ] = None
    sequence_length: Annotated[int, Opt("tokens a window, the start token included", min=2)] = 256
    per_document: Annotated[Literal["auto", "first", "all"], Opt("windows of a document that are scored")] = "auto"
    by_layer: Annotated[bool, Opt("hold one decoder layer at a time: slower, for models larger than memory")] = False
    attached: Annotated[bool, Opt("with the learned prompt that is attached", negative="no-prompt")] = True
    arms: Annotated[bool, Opt("what an attached prompt wins back: the five arms; needs `--dense`")] = False
    dense: Annotated[Path | None, Opt("the uncompressed model, for `--arms`", metavar="MODEL")] = None
    foreign: Annotated[tuple[Path, ...], Opt("with `--arms`, text of another kind (repeatable)", metavar="FILE")] = ()
    predictors: Annotated[
        bool, Opt("read what attached predictors of sparsity leave, as decoding does", negative="no-predictors")
    ] = True
    against: Annotated[
        Methods | None,
        Opt(
            "quality against bytes a token: attached predictors beside these ways to choose",
            metavar=",".join(get_args(Method)),
        ),
    ] = None
    picture: Annotated[Path | None, Opt("where `--against` puts its picture, as SVG", metavar="FILE")] = None
    sample: Annotated[int | None, Opt("also let each model go on for N tokens, greedily", min=1)] = None
    prompt: Annotated[str | None, Opt(f"what they go on from; by default `{_PROMPT}`")] = None

    def __post_init__(self) -> None:
        if self.text is None and self.choices is None:
            raise UsageError("nothing to score", hint="give `--text FILE` or `--choices FILE`")
        if self.text == self.choices:
            raise UsageError("`--text` and `--choices` name one file", hint="they are of different forms")
        if self.arms != (self.dense is not None):
            raise UsageError("`--arms` and `--dense MODEL` go together")
        alone = (self.choices, self.compare, self.sample, self.prompt)
        if self.arms and (self.text is None or self.by_layer or any(value is not None for value in alone)):
            raise UsageError("`--arms` scores texts and nothing else", hint="give `--text FILE --arms --dense MODEL`")
        if self.arms and not self.attached:
            raise UsageError("`--arms` is about the prompt that `--no-prompt` leaves out")
        if self.foreign and not self.arms:
            raise UsageError("`--foreign` goes with `--arms`")
        if self.picture is not None and self.against is None:
            raise UsageError("`--picture` goes with `--against`")
        if self.against is not None:
            odd = (self.choices, self.compare, self.sample, self.prompt, self.dense)
            if self.text is None or self.by_layer or any(value is not None for value in odd):
                raise UsageError("`--against` scores a text and nothing else", hint="give `--text FILE --against LIST`")
            if not self.predictors:
                raise UsageError("`--against` is about the predictors that `--no-predictors` leaves out")
        if self.by_layer and self.sample is not None:
            raise UsageError("`--sample` needs the whole model at every token", hint="leave out `--by-layer`")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How `generate` goes on."""

    prompt: Annotated[str, Opt("what to go on from, `-` for stdin", metavar="TEXT|-")]
    max_new_tokens: Annotated[int, Opt("stop after this many tokens", min=1)] = 128
    temperature: Annotated[float, Opt("1 draws as the model was trained, 0 takes the likeliest", min=0)] = 1.0
    top_p: Annotated[float, Opt("draw from the likeliest tokens that hold this share", min=0, max=1)] = 1.0
    attached: Annotated[bool, Opt("with the learned prompt that is attached", negative="no-prompt")] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `bench` times."""

    prompt_tokens: Annotated[int, Opt("tokens of the prompt", min=1)] = 128
    new_tokens: Annotated[int, Opt("tokens decoded after it", min=1)] = 64
    calibrate: Annotated[
        Path | None,
        Opt("instead of a model, measure this machine and its disk there: a file for `--machine`", metavar="FILE.toml"),
    ] = None


def kernels(run: RunOptions) -> AbstractContextManager[None]:
    """Hold `--kernels` for a command that runs no pipeline."""
    from rewright.kernels import dispatch

    return dispatch.asked(run.kernels)


def talk(run: RunOptions) -> console.Console:
    """Where a command of these speaks."""
    told = console.current()
    leads = world.current().leads
    told.configure(quiet=run.quiet or not leads, verbose=run.verbose, events=run.events if leads else None)
    return told


def _where(run: RunOptions) -> dict[str, Any]:
    return {"device": run.device, "dtype": run.dtype, "threads": run.threads}


def evaluate(model: Model, options: EvalOptions, run: RunOptions) -> None:
    """Score a model on text: perplexity per scored token, bits per byte; on questions: accuracy.

    With --compare both are scored on the same tokens, and the divergence
    and agreement of the two are added. Every window starts as the tokenizer
    starts a text; the JSON states windows, stride and scored tokens.

    Example: rewright eval out --text heldout.txt --compare model --sample 80
    """
    from rewright.passes.evaluate import evaluate as score

    reporter = talk(run)
    if options.arms:
        with kernels(run):
            arms(model, options, run)
        return
    if options.against is not None:
        with kernels(run):
            against(model, options, run)
        return
    began = time.monotonic()
    with kernels(run):
        scores = score(
            model,
            text=options.text,
            choices=options.choices,
            compare=options.compare,
            sequence_length=options.sequence_length,
            per_document=options.per_document,
            by_layer=options.by_layer,
            prompt=options.attached,
            predictors=options.predictors,
            reporter=reporter,
            world=world.current(),
            **_where(run),
        )
        paths = [path for path in (options.compare, model) if path is not None]
        document = {"model": str(model), **scores, "seconds": round(time.monotonic() - began, 3)}
        document["checkpoints"] = {str(path): _stored(path) for path in paths}
        if options.sample is not None or options.prompt is not None:
            document["sample"] = _stories(paths, options.prompt or _PROMPT, options.sample or _SAMPLE, options, run)
    if run.json:
        console.write_json(document)
        return
    console.write(table(eval_rows(document, model, options.compare), head=eval_head(model, options.compare)))
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
        "layer_bits_per_weight": found["layer_bits_per_weight"],
        "seconds_to_make": round(sum(made), 3) if made else None,
    }


def _stories(paths: list[Path], prompt: str, tokens: int, options: EvalOptions, run: RunOptions) -> dict[str, Any]:
    from rewright.passes.generate import generate as continued

    greedy: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.0, "top_p": 1.0, "seed": run.seed}
    greedy["learned"] = options.attached
    texts = {str(path): "".join(continued(path, prompt, **greedy, **_where(run))) for path in paths}
    return {"prompt": prompt, "texts": texts}


def generate(model: Model, options: GenerateOptions, run: RunOptions) -> None:
    """Let a model go on from a prompt. The text streams to stdout as it comes; the prompt is not repeated.

    A quantised model runs on its codes, on a CPU in bfloat16 unless
    --dtype says otherwise.

    Example: rewright generate out --prompt "Once upon a time" --max-new-tokens 100 --temperature 0.8
    """
    from rewright.passes.generate import generate as continued

    talk(run)
    prompt = _prompt(options.prompt)
    began = time.monotonic()
    pieces: list[str] = []
    with kernels(run):
        for piece in continued(
            model,
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=run.seed,
            learned=options.attached,
            **_where(run),
        ):
            pieces.append(piece)
            if not run.json:
                console.write(piece, end="")
    text = "".join(pieces)
    if run.json:
        spent = round(time.monotonic() - began, 3)
        console.write_json({"model": model, "prompt": prompt, "text": text, "seconds": spent})
    elif not text.endswith("\n"):
        console.write("")


def _prompt(word: str) -> str:
    if word != "-":
        return word
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8: byte {error.start}") from None


def bench(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="checkpoint folder")] = None,
    *,
    options: BenchOptions,
    run: RunOptions,
) -> None:
    """Time a model: prefill and decoding in tokens a second, bytes read a token, and the memory it takes.

    A quantised model runs on its codes, on a CPU in bfloat16 unless
    --dtype says otherwise. With `--calibrate box.toml` the machine is
    timed instead, in less than a minute.

    Example: rewright bench out --prompt-tokens 256 --new-tokens 64 --json
    """
    from rewright.passes.generate import bench as timed

    talk(run)
    if options.calibrate is not None:
        if model is not None:
            raise UsageError("`--calibrate` times this machine, and no model", hint=f"leave out `{model}`")
        calibrate(options.calibrate, run)
        return
    if model is None:
        raise UsageError("nothing to time", hint="give a checkpoint folder, or `--calibrate FILE.toml`")
    with kernels(run):
        found = timed(model, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, **_where(run))
    if run.json:
        console.write_json({"model": model, **found})
    else:
        console.write(table(bench_rows(found)))


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    shared = ("device", "dtype", "kernels", "threads", "json", "events", "quiet", "verbose")
    seeded, own, group = ("seed", *shared), "Options", "Measure"
    command(app, "eval", run=seeded, options=EvalOptions, panel=own, rich_help_panel=group)(evaluate)
    command(app, "generate", run=seeded, options=GenerateOptions, panel=own, rich_help_panel=group)(generate)
    command(app, "bench", run=shared, options=BenchOptions, panel=own, rich_help_panel=group)(bench)
