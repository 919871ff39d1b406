"""What a model with recurrences says on a text, beside what it says with its filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from rewright.formats.files import write_file
from rewright.passes import calibration
from rewright.passes.errors import InputError
from rewright.passes.hyena_distill.fits import Job, kept
from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.weighting import spectral_factor

if TYPE_CHECKING:
    from rewright.passes.models.hyena_filter import ModalFilter

# Of the sequences that are drawn, for each so many one is held out.
HELD_OUT = 4
# Tokens of a sequence that nobody chose.
LENGTH = 1024
# Of the response that errors are weighed with.
TAPS = 256
EMBEDDING = "embeddings.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, the sequences to choose orders on and those to report on, int64 [sequences, tokens]; `facts` of them."""

    job: Job
    model: Any
    chosen_on: torch.Tensor
    reported_on: torch.Tensor
    facts: dict[str, Any]

    def logit_error(self, orders: Mapping[str, int]) -> float:
        """The error of the logits relative to their spread over the vocabulary, on the text to choose on."""
        return self._asked(f"try {'-'.join(map(str, orders.values()))}", orders, self.chosen_on)["logit_error"]

    def compare(self, orders: Mapping[str, int]) -> dict[str, Any]:
        """Logits and loss on the text to report on, and what that was."""
        found = self._asked("compare", orders, self.reported_on)
        return {**found, "loss_change": found["loss"] - found["loss_before"], **self.facts}

    def weights(self) -> dict[str, torch.Tensor]:
        """By group the response [filters, taps] that errors are to be convolved with, of what the filters meet.

        Measured by the first process, and kept for all in the stage's folder.
        """
        path, context = self.job.context.common / "weights.safetensors", self.job.context

        def work() -> None:
            if not path.exists():
                found = _met(self.model, self.chosen_on)
                write_file(path, save({group.name: one for group, one in zip(self.job.groups, found, strict=True)}))

        context.world.lead(work)
        found: dict[str, torch.Tensor] = load_file(path)
        return found

    def _asked(self, name: str, orders: Mapping[str, int], tokens: torch.Tensor) -> dict[str, float]:
        """Done by the first process, once."""
        context = self.job.context

        def work() -> dict[str, float]:
            if name not in context.journal.done:
                modals = {group.name: kept(self.job, group, orders[group.name]) for group in self.job.groups}
                context.journal.record(name, _compared(self.model, modals, tokens))
            return dict(context.journal.done[name])

        return context.world.lead(work)


def trial(job: Job) -> Trial | None:
    """The trial that the options ask for; None where they name no text."""
    from rewright.passes.loading import load, load_tokenizer

    options, context = job.options, job.context
    texts = options.calibration_text or options.validation_text
    if not texts:
        return None
    tokenizer = load_tokenizer(job.source)
    if tokenizer is None:
        raise InputError(
            f"`{job.source.path}` has no tokenizer, and a text needs one",
            hint="put the model's `tokenizer.json` beside its weights, or leave out the texts",
        )
    length = options.sequence_length or min(LENGTH, job.groups[0].length)
    rows = next(entry.shape[0] for name, entry in job.source.entries.items() if name.endswith(EMBEDDING))

    def drawn(paths: Any, held_out: int) -> calibration.Calibration:
        documents = [one for path in paths for one in calibration.read_documents(path, context.inputs)]
        given = {"samples": options.samples, "held_out": held_out, "length": length, "seed": context.seed}
        return calibration.draw(documents, tokenizer, rows=rows, **given)

    found = drawn(texts, 0 if options.validation_text else -(-options.samples // HELD_OUT))
    other = drawn(options.validation_text, 0) if options.validation_text else None
    reported = found.held_out if other is None else other.tokens
    if not len(reported):
        context.reporter.warn("no text is left over to report on: the text that orders are chosen on is reported on")
        reported = found.tokens
    facts = {"calibration": found.facts, "reported_sequences": len(reported)}
    model = load(job.source, torch.float32, context.device)[0] if context.world.leads else None
    return Trial(job, model, found.tokens, reported, facts)


def _compared(model: Any, modals: Mapping[str, Modal], tokens: torch.Tensor) -> dict[str, float]:
    """Errors of logits and losses in nats a token, with every mixer's filters and with its recurrences."""
    mixers = _mixers(model)
    recurrences = [_module(modal).to(model.device) for modal in modals.values()]
    wrong = spread = loss = before = 0.0
    with torch.no_grad():
        for row in tokens.to(model.device):
            dense = _logits(model, row)
            for mixer, recurrence in zip(mixers, recurrences, strict=True):
                mixer.modal = recurrence
            made = _logits(model, row)
            for mixer in mixers:
                mixer.modal = None
            wrong += float((made - dense).square().sum())
            spread += float(dense.square().sum())
            loss += float(torch.nn.functional.cross_entropy(made[:-1], row[1:], reduction="sum"))
            before += float(torch.nn.functional.cross_entropy(dense[:-1], row[1:], reduction="sum"))
    count = len(tokens) * (tokens.shape[1] - 1)
    return {"logit_error": (wrong / spread) ** 0.5, "loss": loss / count, "loss_before": before / count}


def _met(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """For the filters of each mixer, the response whose power spectrum is that of their inputs, float64."""
    mixers, length = _mixers(model), tokens.shape[1]
    powers: list[dict[int, torch.Tensor]] = [{} for _ in mixers]

    def watch(found: dict[int, torch.Tensor], inputs: torch.Tensor, which: slice) -> None:
        power = torch.fft.rfft(inputs.double(), 2 * length).abs().square().mean((0, 1))
        first = which.start or 0
        found[first] = found.get(first, torch.zeros_like(power)) + power

    for mixer, found in zip(mixers, powers, strict=True):
        mixer.watch = partial(watch, found)
    with torch.no_grad():
        for row in tokens.to(model.device):
            model(row[None], use_cache=False)
    for mixer in mixers:
        mixer.watch = None
    # filters of one channel stand together, one for each stage
    parts = [torch.stack([found[stage] for stage in sorted(found)], 1).flatten(0, 1) for found in powers]
    return [spectral_factor(part.cpu(), min(TAPS, length)).contiguous() for part in parts]


def _mixers(model: Any) -> list[Any]:
    """The mixers of a model, by layer."""
    from rewright.passes.models.hyena_mixer import Mixer

    return [module for module in model.modules() if isinstance(module, Mixer)]


def _module(modal: Modal) -> ModalFilter:
    """Recurrences as a mixer has them."""
    from rewright.passes.models.hyena_filter import ModalFilter

    filters, entries, _ = modal.poles.shape
    module = ModalFilter(filters, entries, modal.fir.shape[1])
    module.load_state_dict({name: getattr(modal, name) for name in module.state_dict()})
    return module


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Those of one sequence, float64 [tokens, rows]; of a sum over the rows of 0, for it means nothing."""
    logits: torch.Tensor = model(row[None], use_cache=False).logits[0].double()
    return logits - logits.mean(1, keepdim=True)
