"""`dejavu-predictor-train` at work: sense, walk the layers, settle one price, attach, look at held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dejavu import FOLDER
from rewright.formats.draft import Draft
from rewright.formats.files import remove_tree, write_file
from rewright.passes import calibration
from rewright.passes.context import Context
from rewright.passes.dejavu_predictor_train import output, report
from rewright.passes.dejavu_predictor_train.budget import Market, Settled
from rewright.passes.dejavu_predictor_train.job import Job, counted
from rewright.passes.dejavu_predictor_train.layers import Trained, walk
from rewright.passes.dejavu_predictor_train.sensitivity import Sensitivity, by_energy, by_gradients
from rewright.passes.dejavu_predictor_train.spec import RECALL, SENSED, DejavuOptions, check
from rewright.passes.dejavu_predictor_train.thresholds import ladder
from rewright.passes.loading import Assembly, load, load_tokenizer, stored_dtype
from rewright.passes.machine import compute_dtype
from rewright.passes.models import sparse
from rewright.passes.models.families import family_of
from rewright.passes.models.sites import SITES, settle
from rewright.passes.sparsity import Comparison, compare
from rewright.passes.spec import Layout, Metrics
from rewright.passes.weights import Weights
from rewright.passes.writing import carry

# How often a divergence that was asked for is aimed at anew.
AIMS = 4


def run(context: Context, options: DejavuOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Attach predictors; the weights are linked as they are."""
    job, facts = _begin(context, options, source)
    sensitivity = _sensitivity(job)
    walk(job, Assembly(source, _dtype(job), context.device), sensitivity)
    trained = [Trained(job, index) for index in range(job.shape.layers)]
    market = Market([layer.units for layer in trained], even=options.allocation == "layer")
    settled, made, seen = _settle(job, market, trained, sensitivity)
    draft.link_weights(source)
    carry(context, source, draft)
    remove_tree(draft.path / FOLDER)
    for name, data in made.files().items():
        draft.put(name, data)
    return report.put(job, draft, report.Found(facts, market, settled, made, seen, trained))


def _begin(context: Context, options: DejavuOptions, source: Checkpoint) -> tuple[Job, dict[str, Any]]:
    shape = check(options, Layout.of(source))
    tokenizer = load_tokenizer(source)
    texts = [text for path in options.calibration_text for text in calibration.read_documents(path, context.inputs)]
    fit, settling, held = options.rows
    family = family_of(source.config)
    rows = int((source.config or {})["vocab_size"])
    drawn = calibration.draw(
        list(dict.fromkeys(texts)),
        tokenizer,
        rows=rows,
        samples=fit + settling,
        held_out=held,
        length=options.sequence_length,
        seed=context.seed,
    )
    assert family is not None
    used = len(drawn.tokens)
    if used < fit + settling:
        context.reporter.warn(f"the calibration text fills {used} of the {fit + settling} sequences asked for")
    settling = min(settling, max(1, used // 4))
    tokens = torch.cat([drawn.tokens, drawn.held_out])
    kept = counted(tokens, calibration.start_tokens(tokenizer))
    targets = settle(shape, options.targets.names)
    return Job(context, options, source, shape, targets, tokens, kept, used - settling, settling), drawn.facts


def _dtype(job: Job) -> torch.dtype:
    return compute_dtype(job.context.dtype, job.context.device, stored_dtype(job.source))


def _sensitivity(job: Job) -> Sensitivity:
    """How much errors at every site matter, on record once it is known."""
    path, journal = job.context.work / "sensitivity.safetensors", job.context.journal
    if "sensitivity" not in journal.done:
        path_of_layers = family_of(job.source.config).layers
        if job.options.cost == "energy":
            found = by_energy(job.shape, Weights(job.source), path_of_layers)
        else:
            model, _ = load(job.source, _dtype(job), job.context.device, predictors=False)
            layers = model.get_submodule(path_of_layers)
            rows = slice(0, max(1, min(job.fit, SENSED // job.tokens.shape[1])))
            seed, reporter = job.context.seed, job.context.reporter
            found = by_gradients(model, job.shape, layers, job.tokens[rows], job.counted[rows], seed, reporter)
        held = {f"{layer} {site}": tensor.cpu().contiguous() for (layer, site), tensor in found.items()}
        write_file(path, save(held))
        journal.record("sensitivity", {})
    held = load_file(path)
    return {(layer, site): held[f"{layer} {site}"] for layer in range(job.shape.layers) for site in SITES}


def _settle(
    job: Job, market: Market, trained: Sequence[Trained], sensitivity: Sensitivity
) -> tuple[Settled, output.Made, Comparison]:
    """The price that was asked for, what it makes, and how that does on the held-out text."""
    options = job.options

    def at(settled: Settled) -> output.Made:
        return output.make(job, trained, sensitivity, settled, ladder(market, settled))

    if options.budget is not None:
        settled = market.at_share(options.budget)
    elif options.max_kl is not None:
        settled = market.at_cost(options.max_kl)
    else:
        settled = market.at_cost((1 - (options.recall or RECALL)) * market.whole)
    made = at(settled)
    seen = _look(job, made)
    if options.max_kl is None:
        return settled, made, seen
    aim = options.max_kl
    for _ in range(AIMS):
        found = seen.kl / max(1, seen.tokens)
        if 0.9 * options.max_kl <= found <= options.max_kl:
            break
        aim *= 0.97 * options.max_kl / max(found, 1e-12)
        settled = market.at_cost(aim)
        made = at(settled)
        seen = _look(job, made)
    return settled, made, seen


def _look(job: Job, made: output.Made) -> Comparison:
    """Run the held-out text through the model with these predictors."""
    held, kept = job.held_out, job.counted[job.fit + job.settling :]
    model, _ = load(job.source, _dtype(job), job.context.device, predictors=False)
    found = made.aside(job.context.work)
    flow = sparse.attach(model, found)
    return compare(model, flow, held, kept, job.context.reporter, weights=sparse.sensitivities(found))
