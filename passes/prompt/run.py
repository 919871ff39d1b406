"""`prompt` at work: gather text, ask the teacher, learn, attach."""

from __future__ import annotations

from pathlib import Path

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.files import remove_tree
from rewright.formats.peft import FOLDER, Base
from rewright.passes import soft_prompt
from rewright.passes.context import Context
from rewright.passes.loading import load, load_tokenizer, stored_dtype
from rewright.passes.machine import compute_dtype
from rewright.passes.models.prompted import Front
from rewright.passes.prompt import report, start
from rewright.passes.prompt.data import Data, gather
from rewright.passes.prompt.learn import Learner
from rewright.passes.prompt.spec import PromptOptions
from rewright.passes.prompt.teacher import Teacher, check_teacher, check_tokens, is_itself
from rewright.passes.spec import Metrics
from rewright.passes.writing import carry


def run(context: Context, options: PromptOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Attach a learned prompt; the weights are linked as they are."""
    base = soft_prompt.base_of(source)
    options = options.settled(taught=not is_itself(source, context.origin.path))
    if options.steps:
        prompt, found = _learned(context, options, source, base)
    elif options.init.file is not None:
        prompt, found = start.learned(context, options, base, source), None
    else:
        prompt, found = start.hard(options, source, base), None
    draft.link_weights(source)
    carry(context, source, draft)
    if context.world.leads:
        # a prompt that the source has, of whatever kind
        remove_tree(draft.path / FOLDER)
    learned = _told(options, len(found.losses) if found else 0)
    for name, data in soft_prompt.files(prompt.tensor, prompt.depth, base, learned, source.config or {}).items():
        draft.put(name, data)
    return report.put(context, draft, options, prompt, base, found)


def _learned(context: Context, options: PromptOptions, source: Checkpoint, base: Base) -> tuple[Front, report.Found]:
    teacher_path: Path | None = None
    if options.distills:
        teacher_path = options.teacher.checkpoint if options.teacher else context.origin.path
        check_teacher(source, teacher_path)
    tokenizer = load_tokenizer(source)
    data: Data = gather(context, options, tokenizer, base.rows)
    teacher = None
    if teacher_path is not None:
        check_tokens(teacher_path, tokenizer, data.train, base.rows)
        teacher = Teacher(context.common, data.train)
        teacher.ask(context, teacher_path, str(context.device), context.dtype, base.rows)
    dtype = compute_dtype(context.dtype, context.device, stored_dtype(source))
    model, _ = load(source, dtype, context.device, packed=True)
    begun = start.begin(context, options, base, source, model, tokenizer, data)
    columns = start.columns(begun, model, model.get_input_embeddings().weight)
    training = Learner(context, options, model, data, teacher).train(begun, columns)
    found = report.Found(training.losses, training.notes, data.facts)
    return Front(training.constants["best"], begun.depth), found


def _told(options: PromptOptions, steps: int) -> str:
    """What a prompt was learned on, without any path."""
    if not options.steps:
        return f"taken from {Path(options.init.word).name}" if options.init.file else "words, as they are"
    names = ", ".join(path.name for path in options.text)
    where = ", keys and values" if options.depth == "all" else ""
    return f"{names}, {steps} steps of {options.loss}{where}"
