"""OPT models that are trained for a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rewright.passes.evaluate import evaluate
from rewright.passes.generate import generate
from rewright.passes.loading import load
from tests.bench import train_opt

STORIES = [f"Once there was a {animal}. It sat on the {place}." for animal in ("cat", "dog", "hen") for place in "mat"]
SMALL = ["--width", "16", "--inner", "32", "--layers", "2", "--heads", "2", "--length", "64", "--batch", "2"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A text with the stories that are held out among the others, and the words for it."""
    (tmp_path / "all.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    (tmp_path / "held.txt").write_text("\n<|endoftext|>\n".join(STORIES[3:5]))
    return [str(tmp_path / "all.txt"), "--held-out", str(tmp_path / "held.txt"), *SMALL]


def test_a_trained_model_is_a_checkpoint(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that `eval` scores as the training did, and `generate` goes on with; the same seed gives the same bytes."""
    for out in ("one", "two"):
        assert train_opt.main([*files, "--out", str(tmp_path / out), "--steps", "3"]) == 0
    said = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (said["steps"], said["documents"], said["tokens"]) == (3, 7, 3 * 2 * 64)
    assert all(0 < part < 1 for part in said["density"])
    assert len(said["density"]) == 2
    model, tokenizer = load(tmp_path / "one")
    assert tokenizer("Once").input_ids[0] == model.config.bos_token_id == 1
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert "lm_head.weight" not in {name for name, _ in model.named_parameters()}
    found = evaluate(
        tmp_path / "one", text=tmp_path / "held.txt", per_document="all", sequence_length=64, device="cpu", threads=1
    )
    assert found["perplexity"] == pytest.approx(2.718281828 ** said["held_out_loss"], rel=0.05)
    assert "".join(generate(tmp_path / "one", "One", max_new_tokens=5, device="cpu", threads=1))


def test_what_is_held_out_is_never_drawn(files: list[str], tmp_path: Path) -> None:
    """Rows begin where documents do, and every document is seen before one is seen again."""
    tokenizer = train_opt.tokenizer_of(train_opt.DATA / "stories260K", 64)
    documents = train_opt.encoded(tokenizer, STORIES[:3])
    assert all((part[0], part[-1]) == (1, 2) for part in documents)
    short = train_opt.Rows(documents, 3, 20, 1)
    assert [tuple(short(torch.Generator()).shape) for _ in range(2)] == [(6, 11), (3, 21)]
    rows = train_opt.Rows(documents, 3, len(documents[0]) - 1)
    drawn = rows(torch.Generator().manual_seed(0))
    assert drawn.shape == (3, len(documents[0]))
    assert {tuple(row[: len(part)].tolist()) for row in drawn for part in documents} & {tuple(documents[0].tolist())}
    assert not rows.left
    with pytest.raises(SystemExit):
        train_opt.main([files[0], "--held-out", files[0], "--out", str(tmp_path / "out"), *SMALL])


def test_a_training_that_is_cut_off_leaves_a_model(files: list[str], tmp_path: Path) -> None:
    kept: list[int] = []
    real = torch.optim.AdamW.step

    def step(*given: object, **named: object) -> object:
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(len(kept))
        return real(*given, **named)  # type: ignore[arg-type]  # handed on as it came

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train_opt.main([*files, "--out", str(tmp_path / "cut"), "--keep-every", "2"])
    assert load(tmp_path / "cut")[0].config.ffn_dim == 32


def test_one_that_goes_on_from_another(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It begins with the loss that the other ended with, not with that of random weights."""
    words = [*files, "--rate", "0.01", "--short", "0"]
    train_opt.main([*words, "--out", str(tmp_path / "one"), "--steps", "60"])
    said = json.loads(capsys.readouterr().out)
    train_opt.main([*words, "--out", str(tmp_path / "two"), "--steps", "1", "--start", str(tmp_path / "one")])
    assert json.loads(capsys.readouterr().out)["training_loss"] < said["training_loss"] + 0.2 < 5
