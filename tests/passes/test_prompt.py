"""`prompt`: what it learns, that nothing else changes, and that equal runs give equal bytes."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import source_digest
from rewright.formats.peft import read_adapter
from rewright.formats.verify import verify
from rewright.passes import keys, registry
from rewright.passes.context import Silent
from rewright.passes.evaluate import evaluate
from rewright.passes.inputs import Inputs
from rewright.passes.pipeline import execute, plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.compressing import change
from tests.passes.conftest import DATA, ROUNDED, STORIES
from tests.passes.forks import Forks
from tests.passes.outputs import beside, contents, stamp
from tests.passes.prompting import attached, prompt, report, said, words

ATTACHED = "attachments/prompt"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of nine stories that are not learned from, no longer than is scored."""
    path = tmp_path_factory.mktemp("held") / "held.txt"
    stories = (DATA / "tinystories_heldout.txt").read_text().split("<|endoftext|>")[:9]
    path.write_text("<|endoftext|>".join(story[150:550].strip() for story in stories))
    return path


@pytest.fixture(scope="module")
def learned(rounded: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at 3 bits with a prompt that was learned on it; not to be written to."""
    out = tmp_path_factory.mktemp("learned") / "out"
    prompt(rounded, out, text)
    return out


def _empty(model: Path) -> Path:
    """Make a model that finds every token equally likely, whatever it reads."""
    return change(model, lambda tensors: tensors["lm_head.weight"].zero_())


@pytest.mark.parametrize(("loss", "depth"), [("next-token", "input"), ("distill", "input"), ("mix", "all")])
def test_it_wins_back(loss: str, depth: str, rounded: Path, text: Path, held: Path, tmp_path: Path) -> None:
    """On text that it did not learn from, by the protocol of `eval`."""
    teacher = {} if loss == "next-token" else {"teacher": STORIES}
    more = {"steps": 16, "batch_size": 8, "validation_text": [str(held)], "loss": loss, "depth": depth, **teacher}
    made, warnings = prompt(rounded, tmp_path / "out", text, **more)
    assert warnings == []
    metrics = made["metrics"]
    assert metrics.keys() == registry.get("prompt").metrics
    assert (metrics["tokens"], metrics["steps"]) == (4, 16)
    assert metrics["validation_perplexity"] < 0.95 * metrics["perplexity_before"]
    assert math.isclose(metrics["validation_ratio"], metrics["validation_perplexity"] / metrics["perplexity_before"])
    for key, with_it in (("validation_perplexity", True), ("perplexity_before", False)):
        found = evaluate(tmp_path / "out", text=held, sequence_length=32, prompt=with_it)
        assert math.isclose(found["perplexity"], metrics[key], rel_tol=1e-5)
        assert found["prompt_tokens"] == (4 if with_it else 0)


def test_nothing_but_the_prompt_is_new(rounded: Path, learned: Path, text: Path, tmp_path: Path) -> None:
    before = contents(rounded)
    prompt(rounded, tmp_path / "out", text, steps=2)
    assert contents(rounded) == before, "the source stays"
    was, now = rounded / "model.safetensors", learned / "model.safetensors"
    assert was.samefile(now), "a hard link"
    digests = source_digest(Checkpoint.open(rounded)).files, stamp(learned)["files"]
    assert digests[0]["model.safetensors"]["sha256"] == digests[1]["model.safetensors"]["sha256"]
    new = {name for name in contents(learned) if not name.startswith("reports")} - contents(rounded).keys()
    files = ("adapter_config.json", "adapter_model.safetensors", "prompt_embeds.safetensors")
    assert new == {"attachments", ATTACHED, *(f"{ATTACHED}/{name}" for name in files)}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (learned / name).read_bytes() == (rounded / name).read_bytes()
    assert verify(learned).problems == []
    assert attached(learned).shape == (4, 64)
    assert attached(learned).dtype == torch.float32


def test_equal_runs_give_equal_bytes(rounded: Path, learned: Path, text: Path, tmp_path: Path) -> None:
    prompt(rounded, tmp_path / "out", text)
    assert contents(tmp_path / "out") == contents(learned)
    prompt(rounded, tmp_path / "other", text, seed=1)
    assert not torch.equal(attached(tmp_path / "other"), attached(learned))
    assert beside(tmp_path / "out") == []


def test_activations_computed_twice_change_no_byte(rounded: Path, learned: Path, text: Path, tmp_path: Path) -> None:
    prompt(rounded, tmp_path / "out", text, recompute="on")
    for name in ("adapter_model.safetensors", "prompt_embeds.safetensors"):
        assert (tmp_path / "out" / ATTACHED / name).read_bytes() == (learned / ATTACHED / name).read_bytes()
    assert report(tmp_path / "out") == report(learned)
    assert stamp(tmp_path / "out")["key"] == stamp(learned)["key"]


def test_the_report(learned: Path, text: Path) -> None:
    found = report(learned)
    metrics = stamp(learned)["stages"][0]["metrics"]
    assert found["summary"] == metrics
    assert len(found["losses"]) == 8
    steps, perplexities = zip(*found["looks"], strict=True)
    assert steps[0] == 0
    assert steps[-1] == 8
    assert (min(perplexities), steps[perplexities.index(min(perplexities))]) == (
        metrics["validation_perplexity"],
        metrics["best_step"],
    )
    assert found["prompt"]["bytes"] == attached(learned).numel() * 4
    told = found["text"]
    assert told["documents"] == len([part for part in text.read_text().split("<|endoftext|>") if part.strip()])
    assert told["windows"] >= 32
    assert told["pieces_used"] + told["pieces_held_out"] < told["pieces"], "no more than the steps can see"


def test_the_picture(learned: Path) -> None:
    picture = (learned / "reports" / "prompt.svg").read_text()
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    told = " ".join(root.itertext())
    assert "How the prompt learned" in told
    best = stamp(learned)["stages"][0]["metrics"]["best_step"]
    assert f"best at step {best}" in told
    assert picture.count("<polyline") == 2


def test_no_path_is_in_what_it_writes(learned: Path, rounded: Path, text: Path) -> None:
    """But for the stamp, which has the options of every pass as they were given."""
    for file in [*(learned / "attachments").rglob("*"), *(learned / "reports").rglob("*")]:
        if file.is_file():
            for path in (text.parent, rounded.parent, learned.parent):
                assert str(path).encode() not in file.read_bytes(), file


def test_a_prompt_that_does_not_help(
    forks: Forks, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """No prompt can help a model that predicts nothing. `--patience` ends it early."""
    src = _empty(tiny_copy("llama"))
    made, warnings = prompt(src, tmp_path / "out", text, patience=1)
    (first, _), (second, _) = report(tmp_path / "out")["looks"]
    assert (first, second) == (0, made["metrics"]["steps"])
    assert second < 8, "the second look brought nothing"
    assert made["metrics"]["best_step"] == 0
    assert made["metrics"]["validation_ratio"] == 1
    told = read_adapter(tmp_path / "out").learned
    assert told == f"{text.name}, {second} steps of next-token", "as many as were taken"
    assert warnings == [
        "the prompt does not help: perplexity 512.000 on the validation text, 512.000 without it",
    ]
    ended = forks.run("prompt", src, tmp_path / "asked", *words(text, steps=2), "--require", "validation_ratio<1")
    assert ended.code == 5
    assert "warning: the prompt does not help" in ended.err
    assert "error: `validation_ratio` is 1, required < 1\n" in ended.err
    assert not (tmp_path / "asked").exists()


def test_a_bound_that_is_missed_costs_no_second_run(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    dst, events = tmp_path / "out", tmp_path / "events.jsonl"
    asked = ["prompt", rounded, dst, *words(text)]
    ended = forks.run(*asked, "--require", "validation_ratio<0.01")
    assert ended.code == 5, ended.err
    assert not dst.exists()
    assert forks.run(*asked, "--require", "validation_ratio<2", "--events", events).code == 0
    assert "look" not in {json.loads(line)["event"] for line in events.read_text().splitlines()}


def test_a_bound_on_no_metric_is_refused_first(rounded: Path, text: Path, tmp_path: Path, forks: Forks) -> None:
    ended = forks.run("prompt", rounded, tmp_path / "out", *words(text), "--require", "perplexity_ratio_of_x<1")
    assert ended.code == 2
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("init", ["text", "vocab", "random", "words"])
def test_what_it_begins_as(init: str, rounded: Path, text: Path, tmp_path: Path) -> None:
    """With no steps that matter the best is the first: rates of nothing leave it as it began."""
    more: dict[str, Any] = {"init_text": "Once upon a time there was"} if init == "words" else {"init": init}
    small = {"steps": 1, "learning_rate": 1e-30, **more}
    prompt(rounded, tmp_path / "one", text, **small)
    begun = attached(tmp_path / "one")
    table = load_file(rounded / "model.safetensors")["model.embed_tokens.weight"]
    rows = (torch.cdist(begun.double(), table.double()) < 1e-6).sum(dim=1)
    if init == "random":
        assert not rows.any()
        assert 0.5 < begun.square().mean() / table.square().mean() < 2
    else:
        assert rows.all(), "each is the embedding of a token"
    prompt(rounded, tmp_path / "seed", text, seed=1, **small)
    assert torch.equal(attached(tmp_path / "seed"), begun) == (init == "words")


def test_words_are_repeated_to_the_prompt_s_length(rounded: Path, text: Path, tmp_path: Path) -> None:
    prompt(rounded, tmp_path / "own", steps=0, init_text="Once upon a time")
    own = attached(tmp_path / "own")
    prompt(rounded, tmp_path / "long", steps=0, init_text="Once upon a time", tokens=2 * len(own) + 1)
    assert torch.equal(attached(tmp_path / "long"), torch.cat([own, own, own[:1]]))


def test_a_prompt_learned_elsewhere(learned: Path, tmp_path: Path) -> None:
    """Onto another compressed model of the same base, by its checkpoint, its folder, its file; no step is taken."""
    other = tmp_path / "w2"
    execute(Run(STORIES, other, (make_stage(1, "compress", {**ROUNDED, "bits": 2}),), RunOptions(threads=1)), Silent())
    folder = learned / ATTACHED
    places = (learned, folder, folder / "adapter_model.safetensors", folder / "prompt_embeds.safetensors")
    for number, place in enumerate(places):
        out = tmp_path / f"out{number}"
        made, warnings = prompt(other, out, steps=0, init=place)
        assert (made["metrics"], warnings) == ({"tokens": 4}, [])
        assert torch.equal(attached(out), attached(learned))
        assert "losses" not in report(out)
        assert not (out / "reports" / "prompt.svg").exists()
        assert (out / "model.safetensors").samefile(other / "model.safetensors")


def test_learning_goes_on_from_a_prompt(rounded: Path, learned: Path, text: Path, tmp_path: Path) -> None:
    made, _ = prompt(rounded, tmp_path / "out", text, init=learned, steps=4)
    assert made["metrics"]["tokens"] == 4
    first = report(tmp_path / "out")["looks"][0][1]
    assert math.isclose(first, report(learned)["summary"]["validation_perplexity"], rel_tol=1e-6)
    # and as keys and values of what the prompt says
    made, _ = prompt(rounded, tmp_path / "all", text, init=learned, steps=1, depth="all")
    assert math.isclose(report(tmp_path / "all")["looks"][0][1], first, rel_tol=1e-4)


def test_a_prompt_takes_another_s_place(learned: Path, rounded: Path, text: Path, tmp_path: Path) -> None:
    """Nothing of the former is left, whatever it had."""
    prompt(learned, tmp_path / "out", text, depth="all", steps=2)
    prompt(rounded, tmp_path / "anew", text, depth="all", steps=2)
    names = sorted(path.name for path in (tmp_path / "out" / ATTACHED).iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(attached(tmp_path / "out"), attached(tmp_path / "anew"))
    prompt(tmp_path / "out", tmp_path / "back", text)
    assert torch.equal(attached(tmp_path / "back"), attached(learned)), "what is attached is not learned on"
    assert verify(tmp_path / "out").problems == []


def _parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = document["stages"][-1]["details"]["parts"]
    assert isinstance(found, list)
    return found


def test_a_chain_s_teacher_is_its_source(rounded: Path, text: Path, tmp_path: Path) -> None:
    """It is asked without a word; alone, a model has no teacher, and the text's next tokens are learned."""
    stages = make_stage(1, "compress", ROUNDED), make_stage(2, "prompt", said(text, steps=4))
    steps = [part["step"] for part in _parts(plan(Run(STORIES, tmp_path / "chain", stages, RunOptions(threads=1))))]
    assert steps[0] == "ask the teacher"
    execute(Run(STORIES, tmp_path / "chain", stages, RunOptions(threads=1)), Silent())
    prompt(rounded, tmp_path / "apart", text, loss="distill", steps=4, teacher=STORIES)
    assert torch.equal(attached(tmp_path / "chain"), attached(tmp_path / "apart"))
    assert [made["pass"] for made in stamp(tmp_path / "chain")["stages"]] == ["compress", "prompt"]
    assert stamp(tmp_path / "chain")["stages"][1]["options"]["teacher"] is None
    prompt(rounded, tmp_path / "alone", text, steps=4)
    prompt(rounded, tmp_path / "next", text, loss="next-token", steps=4)
    assert torch.equal(attached(tmp_path / "alone"), attached(tmp_path / "next"))
    prompt(rounded, tmp_path / "taught", text, steps=4, teacher=STORIES)
    assert torch.equal(attached(tmp_path / "taught"), attached(tmp_path / "apart"))


def test_on_either_side_of_other_passes(text: Path, tmp_path: Path) -> None:
    """A prompt travels with what other passes write, and fits it."""
    steps = make_stage(1, "prompt", said(text, steps=2)), make_stage(2, "compress", ROUNDED)
    execute(
        Run(STORIES, tmp_path / "out", (*steps, make_stage(3, "cast", {"to": "bf16"})), RunOptions(threads=1)), Silent()
    )
    prompt(STORIES, tmp_path / "dense", text, steps=2)
    assert torch.equal(attached(tmp_path / "out"), attached(tmp_path / "dense"))
    assert evaluate(tmp_path / "out", text=text, sequence_length=32)["prompt_tokens"] == 4
    made, warnings = prompt(tmp_path / "out", tmp_path / "again", steps=0, init=tmp_path / "dense")
    assert (made["metrics"], warnings) == ({"tokens": 4}, []), "an embedding in bfloat16 is the same base"


def test_dry_run_tells_what_comes(rounded: Path, text: Path, learned: Path) -> None:
    stage = make_stage(1, "prompt", said(text))
    document = plan(Run(rounded, Path("/nowhere/out"), (stage,), RunOptions(threads=1)))
    told = document["stages"][0]
    assert told["details"]["tokens"] == 4
    assert told["details"]["prompt_bytes"] == attached(learned).numel() * 4
    assert told["flops"] > 0
    assert told["output_bytes"] >= 2 * attached(learned).numel() * 4
    stage = make_stage(1, "prompt", said(init=learned, steps=0))
    document = plan(Run(rounded, Path("/nowhere/out"), (stage,), RunOptions(threads=1)))
    assert (document["stages"][0]["flops"], document["stages"][0]["details"]["tokens"]) == (0, 4)


def test_a_run_is_not_done_twice(rounded: Path, text: Path, tmp_path: Path) -> None:
    """What is in a file counts, not where it is."""
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    prompt(rounded, tmp_path / "out", text, steps=1)
    for path in (text, copy):
        stage = make_stage(1, "prompt", said(path, steps=1))
        document = execute(Run(rounded, tmp_path / "out", (stage,), RunOptions(threads=1)), Silent())
        assert document["state"] == "up-to-date"


def test_a_start_that_became_a_file(rounded: Path, learned: Path, text: Path) -> None:
    """A difference is told without a digest."""
    digest = source_digest(Checkpoint.open(rounded))

    def record(**options: Any) -> dict[str, Any]:
        stage = make_stage(1, "prompt", {**said(text), "tokens": 4, **options})
        return keys.record([stage], RunOptions(), digest, Inputs())

    word, file = record(init="vocab"), record(init=str(learned))
    assert keys.differences(word, file) == ["`--init` was vocab, is a file"]
    assert keys.differences(file, word) == ["`--init` was a file, is vocab"]
    assert record(init=str(learned / ATTACHED)) == file, "one prompt by another name"


def test_other_families_and_experts(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    for name in ("opt-350m", "gpt2", "bloom", "gemma2", "mixtral", "falcon-alibi"):
        prompt(tiny(name), tmp_path / name, text, steps=3)
        assert len(report(tmp_path / name)["losses"]) == 3, name
        assert verify(tmp_path / name).problems == [], name


def test_half_kept_and_sixteen_bits(half: Path, text: Path, tmp_path: Path) -> None:
    """Codes beside a mask, and a model of bfloat16, are learned on as they are."""
    execute(Run(half, tmp_path / "masked", (make_stage(1, "convert", {"to": "bitmask-w4"}),), RunOptions()), Silent())
    prompt(half, tmp_path / "packed", text, steps=3)
    prompt(tmp_path / "masked", tmp_path / "out", text, steps=3)
    assert torch.equal(attached(tmp_path / "out"), attached(tmp_path / "packed"))
    prompt(half, tmp_path / "bf16", text, steps=3, dtype="bf16")
    found = attached(tmp_path / "bf16")
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float()), "learned in float32 all the same"
