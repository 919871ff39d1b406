"""The loss of a prompt and its gradient against plain transformers and autograd; the steps, and what is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import Heads
from rewright.passes.loading import load, load_tokenizer
from rewright.passes.models.prompted import Front
from rewright.passes.models.running import cache_name
from rewright.passes.prompt import start, units
from rewright.passes.prompt.data import gather
from rewright.passes.prompt.learn import Learner
from rewright.passes.prompt.spec import TOP, PromptOptions
from rewright.passes.prompt.teacher import Teacher
from rewright.passes.scoring import Window
from rewright.passes.soft_prompt import base_of
from rewright.passes.training import Training, shuffled
from tests.passes.conftest import STORIES
from tests.passes.prompting import context, prompt

LENGTH = 24


def _learner(
    model: Path, text: Path, folder: Path, loss: str, depth: str, teacher: Path | None = None, **more: Any
) -> tuple[Learner, Training]:
    """A prompt of noise at its first step."""
    asked = PromptOptions(
        text=(text,), tokens=5, steps=4, batch_size=6, sequence_length=LENGTH, loss=loss, depth=depth, **more
    )
    source, here = Checkpoint.open(model), context(folder, model)
    running, tokenizer = load(source, torch.float32, packed=True)
    data = gather(here, asked, tokenizer, base_of(source).rows)
    told = None
    if teacher is not None:
        told = Teacher(folder, data.train)
        told.ask(here, teacher, "cpu", "f32", base_of(source).rows)
    width = Heads.of(source.config or {}).numbers if depth == "all" else base_of(source).width
    begun = Front(0.3 * torch.randn(5, width, generator=torch.Generator().manual_seed(2)), depth)  # type: ignore[arg-type] # a word
    learner = Learner(here, asked, running, data, told)
    learner.depth = begun.depth
    parts = start.columns(begun, running, running.get_input_embeddings().weight)
    held = {name: begun.tensor[:, place] for name, (place, _) in parts.items()}
    rates = dict.fromkeys(held, 0.1)
    return learner, Training.begin("prompt", folder / "state", 4, held, rates, {"best": begun.tensor})


def _logits(model: Any, tensor: torch.Tensor, depth: str, window: Window) -> torch.Tensor:
    """Before each target of a window, by plain transformers."""
    tokens = torch.tensor([window.tokens])
    if depth == "input":
        embeds = torch.cat([tensor[None], model.get_input_embeddings()(tokens)], dim=1)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    else:
        cache, heads = DynamicCache(config=model.config), Heads.of(model.config.to_dict())
        parts = tensor.view(len(tensor), 2 * heads.layers, heads.count, heads.width).permute(1, 2, 0, 3)[:, None]
        for layer in range(heads.layers):
            cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        logits = model(input_ids=tokens, use_cache=True, **{cache_name(model): cache}).logits[0]
    return torch.log_softmax(logits[-window.scored - 1 : -1], dim=1)


def _loss(kind: str, ours: torch.Tensor, theirs: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The sum over a window's targets."""
    targets = torch.tensor(window.tokens[-window.scored :])
    entropy = -ours.gather(1, targets[:, None]).sum()
    if kind == "next-token":
        return entropy
    assert theirs is not None
    likeliest = theirs.topk(TOP, dim=1).indices
    known, rest = theirs.gather(1, likeliest), theirs.scatter(1, likeliest, -math.inf).logsumexp(1)
    own, others = ours.gather(1, likeliest), ours.scatter(1, likeliest, -math.inf).logsumexp(1)
    divergence = (known.exp() * (known - own)).sum() + (rest.exp() * (rest - others)).sum()
    return divergence if kind == "distill" else 0.5 * (entropy + divergence)


@pytest.mark.parametrize("depth", ["input", "all"])
@pytest.mark.parametrize("kind", ["next-token", "distill", "mix"])
def test_loss_and_gradient(
    kind: str,
    depth: str,
    half: Path,
    tiny: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean over a step's targets, whichever units its windows go through the model in."""
    monkeypatch.setattr(units, "UNIT_TOKENS", 64)
    teacher = None if kind == "next-token" else tiny("llama")
    learner, training = _learner(half, text, tmp_path, kind, depth, teacher)
    places = shuffled(len(learner.data.train), 6, 0, 0).tolist()
    found = [learner.data.train[place] for place in places]
    assert len(units.units([len(window.tokens) for window in found], 5)) > 2
    told, gradients = learner._gradients(training, 0)

    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    tensor = torch.cat(list(training.parameters.values()), dim=1).detach().requires_grad_()
    total = torch.zeros(())
    for window in found:
        with torch.no_grad():
            theirs = torch.log_softmax(dense(torch.tensor([window.tokens])).logits[0, -window.scored - 1 : -1], dim=1)
        total = total + _loss(kind, _logits(model, tensor, depth, window), theirs, window)
    mean = total / sum(window.scored for window in found)
    (wanted,) = torch.autograd.grad(mean, tensor)
    # the teacher's log-probabilities are kept in 16 bits
    close = 2e-5 if kind == "next-token" else 2e-3
    assert math.isclose(told, float(mean.detach()), rel_tol=close)
    whole = torch.cat(list(gradients.values()), dim=1)
    assert float((whole - wanted).norm() / wanted.norm()) < close
    assert float(wanted.norm()) > 0


def test_the_teacher_s_likeliest_tokens(
    rounded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the units that it is asked in; a window's are found again by its place."""
    whole = _learner(rounded, text, tmp_path / "whole", "distill", "input", STORIES)[0].teacher
    monkeypatch.setattr("rewright.passes.prompt.teacher.TOGETHER", 100)
    learner, _ = _learner(rounded, text, tmp_path / "cut", "distill", "input", STORIES)
    cut, windows = learner.teacher, learner.data.train
    assert cut is not None
    assert whole is not None
    assert len(list((tmp_path / "cut").glob("teacher-*.safetensors"))) > 4
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    places = [len(windows) - 1, 0, 3]
    ids, logs = cut.of(places)
    assert torch.equal(ids, whole.of(places)[0])
    first = 0
    for place in places:
        window = windows[place]
        with torch.no_grad():
            told = torch.log_softmax(model(torch.tensor([window.tokens])).logits[0, -window.scored - 1 : -1], dim=1)
        own = slice(first, first := first + window.scored)
        assert torch.allclose(told.gather(1, ids[own].long()), logs[own], atol=5e-3, rtol=1e-3)
        assert torch.allclose(told.topk(TOP, dim=1).values, logs[own], atol=5e-3, rtol=1e-3)
    assert first == len(ids)


def test_activations_computed_twice(half: Path, text: Path, tmp_path: Path) -> None:
    """And the model is as it was when it is over."""
    found = {}
    for recompute in ("off", "on"):
        learner, training = _learner(half, text, tmp_path / recompute, "next-token", "input", recompute=recompute)
        with learner._recomputing():
            layer = learner.model.model.layers[0]
            assert ("forward" in vars(layer)) == (recompute == "on")
            found[recompute] = learner._gradients(training, 0)
        assert "forward" not in vars(layer)
    assert found["off"][0] == found["on"][0]
    assert all(torch.equal(found["off"][1][name], part) for name, part in found["on"][1].items())


def test_nothing_of_the_model_learns(half: Path, text: Path, tmp_path: Path) -> None:
    learner, training = _learner(half, text, tmp_path, "next-token", "input")
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in learner.model.parameters())
    training.run(lambda step: learner._gradients(training, step), lambda loss: None)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_the_best_step_is_kept(rounded: Path, text: Path, tmp_path: Path) -> None:
    """Not the last: a rate that is far too high makes every later look worse."""
    prompt(rounded, tmp_path / "begun", text, learning_rate=1e-30, steps=4)
    made, _ = prompt(rounded, tmp_path / "out", text, learning_rate=1e4, steps=4)
    assert made["metrics"]["best_step"] == 0
    name = "attachments/prompt/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "begun" / name).read_bytes()


def test_units_hold_so_many_tokens_and_every_window_once() -> None:
    lengths = [7, 2000, 30, 31, 30, 5000, 8] + [100] * 50
    found = units.units(lengths, 100)
    assert sorted(place for unit in found for place in unit) == list(range(len(lengths)))
    for unit in found:
        longest = max(lengths[place] for place in unit)
        assert len(unit) == 1 or len(unit) * (100 + longest) <= units.UNIT_TOKENS
    assert units.units([], 3) == []


def test_a_pad_token_is_not_needed(rounded: Path, text: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(rounded, tmp_path / "src"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = json.loads((src / name).read_text())
        (src / name).write_text(json.dumps({key: value for key, value in said.items() if key != "pad_token"}))
    assert load_tokenizer(Checkpoint.open(src)).pad_token is None
    made, _ = prompt(src, tmp_path / "out", text, steps=2)
    assert made["metrics"]["steps"] == 2
