"""Multiple-choice questions: the answer a model finds likeliest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.passes import calibration
from rewright.passes.errors import BoundError, InputError
from rewright.passes.scoring import Scorer, Window, log_probabilities, targets

if TYPE_CHECKING:
    from rewright.passes.context import Reporter
    from rewright.passes.inputs import Inputs

# How the fields are called in the question files that are around: (question, answers, the right one).
SHAPES = (("query", "choices", "gold"), ("ctx", "endings", "label"), ("question", "choices", "answerKey"))


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
            labels, listed = _answers(record[answers])
            if not isinstance(record[text], str) or len(listed) < 2:
                raise InputError(f"{where}: `{text}` and `{answers}` are not a text and two answers or more")
            index = labels.index(str(record[right])) if str(record[right]) in labels else -1
            if index < 0 or isinstance(record[right], bool):
                raise InputError(f"{where}: `{right}` {record[right]!r} names none of {len(listed)} answers")
            return Question(
                calibration.whole(record[text], where), tuple(calibration.whole(one, where) for one in listed), index
            )
    forms = " or ".join(", ".join(f"`{name}`" for name in shape) for shape in SHAPES)
    found = ", ".join(f"`{key}`" for key in keys) or "no keys"
    raise InputError(f"{where} is no question: found {found}", hint=f"wanted: {forms}")


def _answers(said: Any) -> tuple[list[str], list[str]]:
    """(how the right answer is named, the answers): a plain list, or ARC's lists of labels and texts."""
    if isinstance(said, dict) and isinstance(said.get("text"), list) and isinstance(said.get("label"), list):
        labels, listed = [str(label) for label in said["label"]], said["text"]
        if len(labels) != len(listed):
            return [], []
    elif isinstance(said, list):
        labels, listed = [str(number) for number in range(len(said))], said
    else:
        return [], []
    return (labels, listed) if all(isinstance(one, str) for one in listed) else ([], [])


def _window(scorer: Scorer, start: list[int], question: str, answer: str) -> Window:
    """Question and answer as one text; the targets are the tokens from the first that the question alone lacks."""
    head = calibration.encode(scorer.tokenizer, question, scorer.rows)
    whole = calibration.encode(scorer.tokenizer, f"{question} {answer}", scorer.rows)
    differing = (place for place, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1])
    shared = next(differing, min(len(head), len(whole) - 1))
    room = (scorer.positions or len(start + whole)) - len(start)
    tokens = start + whole[-room:]
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
            if any(math.isnan(total) for total in sums) or max(sums) == -math.inf:
                raise BoundError("the answers' likelihoods are not numbers", hint="try `--dtype f32`")
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
