"""One protocol of scoring, held to numbers that can be worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewright.passes.errors import BoundError, InputError
from rewright.passes.evaluate import evaluate
from rewright.passes.generate import bench, generate
from rewright.passes.loading import load
from rewright.passes.scoring import Window, open_scorer, scored
from rewright.passes.walk import Walk
from tests.passes.conftest import DATA, STORIES

HELD_OUT = DATA / "tinystories_heldout.txt"


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Three documents of different lengths."""
    parts = [part.strip() for part in HELD_OUT.read_text().split("<|endoftext|>") if part.strip()]
    path = tmp_path / "some.txt"
    path.write_text("<|endoftext|>".join([parts[0], parts[1][:60], parts[2]]))
    return path


def change(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("length", [2, 7, 64, 128])
@pytest.mark.parametrize("per_document", ["first", "all"])
def test_a_model_that_knows_nothing(
    length: int, per_document: str, tiny_copy: Callable[[str], Path], some: Path
) -> None:
    """All rows equally likely: the perplexity is the number of rows, for any window."""
    folder = tiny_copy("llama")
    change(folder, "lm_head.weight", 0.0)
    report = evaluate(folder, text=some, sequence_length=length, per_document=per_document)  # type: ignore[arg-type]
    assert math.isclose(report["perplexity"], 512, rel_tol=1e-6)
    assert report["stride"] == length - 1
    if per_document == "all":
        assert math.isclose(report["bits_per_byte"], 9 * report["scored_tokens"] / _bytes(some), rel_tol=1e-6)


def _bytes(path: Path) -> int:
    return sum(len(part.strip().encode()) for part in path.read_text().split("<|endoftext|>"))


def test_windows_cover_every_token_once(some: Path) -> None:
    _, tokenizer = load(STORIES)
    documents = [part.strip() for part in some.read_text().split("<|endoftext|>")]
    counts = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in documents]
    report = evaluate(STORIES, text=some, sequence_length=32, per_document="all")
    assert report["scored_tokens"] == sum(counts)
    assert report["windows"] == sum(math.ceil(count / 31) for count in counts)
    assert report["documents"] == 3
    assert report["start_token"] == tokenizer.bos_token_id
    first = evaluate(STORIES, text=some, sequence_length=32)
    assert first["per_document"] == "first"
    assert first["scored_tokens"] == sum(min(count, 31) for count in counts)


def test_perplexity_by_hand(some: Path) -> None:
    """Window by window without padding or batching, through the model alone."""
    model, tokenizer = load(STORIES)
    loss, scored = 0.0, 0
    for part in some.read_text().split("<|endoftext|>"):
        ids = tokenizer(part.strip()).input_ids[:64]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="sum"))
        scored += len(ids) - 1
    report = evaluate(STORIES, text=some, sequence_length=64)
    assert report["scored_tokens"] == scored
    assert math.isclose(report["perplexity"], math.exp(loss / scored), rel_tol=1e-5)


def test_the_real_model_on_the_held_out_stories() -> None:
    report = evaluate(STORIES, text=HELD_OUT)
    assert report["documents"] == report["windows"] == 75
    assert report["scored_tokens"] == 19118
    assert math.isclose(report["perplexity"], 3.9898, abs_tol=2e-3)
    assert "tinystories" in report["text"]["name"]


def test_a_model_agrees_with_itself_and_not_with_another(tiny_copy: Callable[[str], Path], some: Path) -> None:
    same = evaluate(STORIES, text=some, compare=STORIES)
    assert same["perplexity_ratio"] == 1
    assert same["kl"] == 0
    assert same["top1_agreement"] == 1
    folder = tiny_copy("llama")
    change(folder, "lm_head.weight", 0.0)
    other = evaluate(folder, text=some, compare=STORIES, sequence_length=64)
    alone = evaluate(STORIES, text=some, sequence_length=64)
    assert math.isclose(other["other"]["perplexity"], alone["perplexity"], rel_tol=1e-9)
    # against a uniform model the divergence is log of the rows less the entropy
    assert 0 < other["kl"] < math.log(512)
    assert other["top1_agreement"] < 0.2


def test_models_of_other_vocabularies_are_not_compared(
    tiny_copy: Callable[[str], Path], some: Path, tmp_path: Path
) -> None:
    from tests.passes.conftest import make

    wide = make("llama", tmp_path / "wide", vocab_size=600)
    with pytest.raises(InputError, match="another vocabulary: 512 rows, not 600"):
        evaluate(wide, text=some, compare=STORIES)


def test_what_is_not_a_number_is_refused(tiny_copy: Callable[[str], Path], some: Path) -> None:
    folder = tiny_copy("llama")
    change(folder, "model.norm.weight", 3e38)
    with pytest.raises(BoundError, match="not a number"):
        evaluate(folder, text=some)
    (some.parent / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no token to score"):
        evaluate(STORIES, text=some.parent / "empty.txt")


def test_choices(tmp_path: Path) -> None:
    """Both shapes of question; a model of stories prefers what stories say."""
    path = tmp_path / "questions.jsonl"
    arc = {"query": "Once upon a", "choices": ["zq xv kj", "time, there was a little girl"], "gold": 1}
    swag = {"ctx": "Lily was very happy. She", "endings": ["smiled and said thank you", "vqx zzk jqj"], "label": 0}
    path.write_text("\n".join(json.dumps(one) for one in (arc, swag, {**arc, "gold": 0})))
    report = evaluate(STORIES, choices=path)["choices"]
    assert report["questions"] == 3
    assert math.isclose(report["accuracy"], 2 / 3)
    assert math.isclose(report["accuracy_normalised"], 2 / 3)
    published = {"question": "Once upon a", "answerKey": "B", "choices": {"text": arc["choices"], "label": ["A", "B"]}}
    path.write_text(json.dumps(published))
    assert evaluate(STORIES, choices=path)["choices"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "x", "answer": "y"}, "line 1 is no question: found `question`, `answer`"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "`gold` 2 names none of 2 answers"),
        ({"query": "x", "choices": ["a", "b"], "gold": 0.9}, "`gold` 0.9 names none"),
        ({"query": "x", "choices": ["a", "b"], "gold": True}, "`gold` True names none"),
        ({"query": "x", "choices": ["a", "b"], "gold": None}, "`gold` None names none"),
        ({"query": "x", "choices": "xyz", "gold": 0}, "not a text and two answers"),
        ({"query": "x", "choices": None, "gold": 0}, "not a text and two answers"),
        ({"query": "x", "choices": {"text": ["a"], "label": []}, "gold": 0}, "not a text and two answers"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "not a text and two answers"),
        ([1], "is no question: found no keys"),
    ],
    ids=str,
)
def test_what_is_no_question(record: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=said):
        evaluate(STORIES, choices=path)


def test_answers_without_a_likelihood_are_refused(tiny_copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_copy("llama")
    change(folder, "model.norm.weight", 3e38)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"query": "Once", "choices": ["a", "b"], "gold": 0}))
    with pytest.raises(BoundError, match="not numbers"):
        evaluate(folder, choices=path)


def test_generation_ends_where_the_generation_config_says(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORIES, tmp_path / "src"))
    whole = "".join(generate(folder, "Once upon a time", max_new_tokens=12))
    _, tokenizer = load(folder)
    first = tokenizer("Once upon a time" + whole).input_ids[len(tokenizer("Once upon a time").input_ids) + 3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    cut = "".join(generate(folder, "Once upon a time", max_new_tokens=12))
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_cache_and_no_cache_say_the_same() -> None:
    """Greedy text with the cache equals the likeliest next token of a whole forward, step by step."""
    model, tokenizer = load(STORIES)
    ids = tokenizer("Once upon a time").input_ids
    for _ in range(24):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "Once upon a time" + "".join(generate(STORIES, "Once upon a time", max_new_tokens=24)) == expected


def test_sampling_is_seeded_and_bounded() -> None:
    def story(seed: int, **said: float) -> str:
        return "".join(generate(STORIES, "Once", max_new_tokens=30, seed=seed, **said))  # type: ignore[arg-type]

    warm = {"temperature": 1.0, "top_p": 0.9}
    assert story(1, **warm) == story(1, **warm) != story(2, **warm)
    assert story(1, temperature=1.0, top_p=0.0) == story(1, temperature=1e-320) == story(5)
    with pytest.raises(InputError, match="past the model's 512 positions"):
        "".join(generate(STORIES, "Once", max_new_tokens=512))


def test_bench_counts() -> None:
    found = bench(STORIES, prompt_tokens=16, new_tokens=8, threads=1)
    assert found["weight_bytes"] == 4 * 260_032
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert found["peak_resident_bytes"] > found["weight_bytes"]


def test_by_layer_scores_alike_and_holds_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of many lengths in several batches; no more than one layer's parameters are anywhere but on meta."""
    text = tmp_path / "some.jsonl"
    stories = ["Once upon a time there was a cat. " * count for count in (1, 5, 2, 9, 3)]
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    monkeypatch.setattr("rewright.passes.evaluate.LOGITS", 512 * 80)
    whole = evaluate(STORIES, text=text, sequence_length=64, compare=STORIES)
    held: list[int] = []
    run_layer = Walk.run_layer

    def watched(walk: Walk, *args: Any, **kwargs: Any) -> Any:
        there = [any(not p.is_meta for p in layer.parameters()) for layer in walk.assembly.layers]
        held.append(sum(there))
        return run_layer(walk, *args, **kwargs)

    monkeypatch.setattr(Walk, "run_layer", watched)
    ours = evaluate(STORIES, text=text, sequence_length=64, compare=STORIES, by_layer=True)
    assert set(held) == {1}
    assert ours["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    assert ours["kl"] == pytest.approx(0, abs=1e-9)
    assert ours["scored_tokens"] == whole["scored_tokens"]


def test_scoring_leaves_gradients_on() -> None:
    scorer = open_scorer(STORIES, "cpu", "f32")
    batches = [[Window([1, 2, 3], 2, 2)], [Window([1, 4, 5, 6], 3, 3)]]
    for found in scored(scorer, batches):
        assert len(found) == 1
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
