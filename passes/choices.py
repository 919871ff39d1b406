"""Multiple-choice questions: the answer a model finds likeliest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.passes import calibration
from rewright.passes.errors import InputError
from rewright.passes.scoring import Scorer, Window, log_probabilities, targets

if TYPE_CHECKING:
    from rewright.passes.context import Reporter
    from rewright.passes.inputs import Inputs

# How the fields are called in the question files that are around: (question, answers, number of the right one).
SHAPES = (("query", "choices", "gold"), ("ctx", "endings", "label"))


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its possible answers and the index of the right one."""

    text: str
    answers: tuple[str, ...]
    right: int


def read(path: Path, inputs: Inputs) -> Iterator[Question]:
    """The questions of a JSON-lines file. Raises InputError naming the line and the keys found."""
    text = calibration.decode(inputs.read(path), str(path))
    for where, record in calibration.json_lines(text, str(path)):
        yield _question(record, where)


def _question(record: Any, where: str) -> Question:
    keys = list(record) if isinstance(record, dict) else []
    for text, answers, right in SHAPES:
        if {text, answers, right} <= set(keys):
            listed, index = tuple(str(one) for one in record[answers]), int(record[right])
            if len(listed) < 2 or not 0 <= index < len(listed):
                raise InputError(f"{where}: `{right}` {index} names none of {len(listed)} answers")
            return Question(str(record[text]), listed, index)
    forms = " or ".join(", ".join(f"`{name}`" for name in shape) for shape in SHAPES)
    raise InputError(
        f"{where} is no question: found {', '.join(f'`{k}`' for k in keys) or 'no keys'}", hint=f"wanted: {forms}"
    )


def _window(scorer: Scorer, start: list[int], question: str, answer: str) -> Window:
    """Question and answer as one text; the targets are the tokens from the first that the question alone lacks."""
    head = calibration.encode(scorer.tokenizer, question, scorer.rows)
    whole = calibration.encode(scorer.tokenizer, f"{question} {answer}", scorer.rows)
    differing = (place for place, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1])
    shared = next(differing, min(len(head), len(whole) - 1))
    tokens = (start + whole)[-(scorer.positions or 0) :]
    return Window(tokens, min(len(whole) - shared, len(tokens) - 1), len(answer.encode()))


def answer(scorer: Scorer, path: Path, inputs: Inputs, reporter: Reporter) -> dict[str, Any]:
    """Accuracy by the log-likelihood of each answer after its question, plain and divided by the answer's bytes."""
    import torch

    start = calibration.start_tokens(scorer.tokenizer)
    plain, normalised = 0, 0
    questions = list(read(path, inputs))
    if not questions:
        raise InputError(f"`{path}` holds no question")
    with reporter.progress("answer", len(questions)) as bar:
        for question in questions:
            batch = [_window(scorer, start, question.text, text) for text in question.answers]
            sums = [
                float(found.gather(1, targets(window, found.device)[:, None]).sum(dtype=torch.float64))
                for window, found in zip(batch, log_probabilities(scorer, batch), strict=True)
            ]
            by_byte = [total / max(1, window.size) for total, window in zip(sums, batch, strict=True)]
            plain += sums.index(max(sums)) == question.right
            normalised += by_byte.index(max(by_byte)) == question.right
            bar.advance()
    return {
        "accuracy": plain / len(questions),
        "accuracy_normalised": normalised / len(questions),
        "questions": len(questions),
        "text": {"name": path.name, "digest": inputs.digest(path)},
    }
