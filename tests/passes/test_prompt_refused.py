"""`prompt` refused: in a line, with its exit code, before work is lost, and nothing left beside the destination."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewright.formats.errors import StorageError
from rewright.formats.peft import FOLDER, TENSOR, WEIGHTS
from rewright.passes.errors import UsageError
from rewright.passes.evaluate import evaluate
from rewright.passes.recipe import make as make_stage
from tests.passes.compressing import change
from tests.passes.conftest import STORIES, make
from tests.passes.fakes import go
from tests.passes.forks import Ended, Forks
from tests.passes.outputs import beside
from tests.passes.prompting import attached, prompt, said, words

END = "<|endoftext|>"
SMALL = ("--tokens", "4", "--steps", "2", "--batch-size", "2", "--sequence-length", "32")


@pytest.fixture(scope="module")
def learned(rounded: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K at 3 bits with a prompt; not to be written to."""
    out = tmp_path_factory.mktemp("learned") / "out"
    prompt(rounded, out, text, steps=1)
    return out


@pytest.fixture(scope="module")
def deep(rounded: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with keys and values."""
    out = tmp_path_factory.mktemp("deep") / "out"
    prompt(rounded, out, text, steps=1, depth="all")
    return out


def _refused(forks: Forks, code: int, told: str, src: Path, dst: Path, *asked: str | Path, hint: str = "") -> Ended:
    """Hold a run to how it is refused: the whole error's line but for what `...` stands for."""
    ended = forks.run("prompt", src, dst, *asked)
    assert (ended.code, ended.out) == (code, ""), ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    begin, _, end = f"error: {told}".partition("...")
    assert line.startswith(begin), line
    assert line.endswith(end) if "..." in told else line == begin
    assert hint in ended.err.partition("hint: ")[2]
    assert not dst.exists()
    assert beside(dst) == []
    return ended


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "there is no text to learn from"),
        ({"steps": 0}, "`--steps 0` attaches a prompt that is there"),
        ({"steps": 0, "init": "vocab"}, "`--steps 0` attaches a prompt that is there"),
        ({"text": ["t"], "init": "vocab", "init-text": "x"}, "`--init-text` goes with `--init text`"),
        ({"text": ["t"], "init-text": ""}, "`--init-text` is empty"),
        ({"text": ["t"], "init": ""}, "`init` must be `vocab`, `text`, `random` or a prompt's file"),
        (
            {"text": ["t"], "teacher": "m", "loss": "next-token"},
            "`--teacher` counts for nothing with `--loss next-token`",
        ),
        ({"text": ["t"], "teacher": "", "loss": "mix"}, "`teacher` must not be empty"),
        ({"text": ["t"], "steps": 0, "init-text": "x"}, "a text counts for nothing with `--steps 0`"),
        ({"validation-text": ["t"], "steps": 0, "init": "f"}, "a text counts for nothing with `--steps 0`"),
        ({"steps": 0, "init": "f", "depth": "all"}, "`--depth` is that of the prompt with `--steps 0`"),
        ({"text": ["t"], "learning-rate": 0}, "`--learning-rate 0` learns nothing"),
        ({"text": ["t"], "learning-rate": 1e39}, "`learning-rate` must be from 0 to 1e+06, not `1e+39`"),
        ({"text": ["t"], "loss": "kl"}, "`loss` must be one of auto, next-token, distill, mix, not `kl`"),
        ({"text": ["t"], "tokens": 0}, "`tokens` must be from 1 to 65536, not `0`"),
        ({"text": ["t"], "sequence-length": 1}, "`sequence-length` must be at least 2, not `1`"),
        ({"text": ["t"], "patience": -1}, "`patience` must be at least 0, not `-1`"),
        ({"text": ["t"], "warmup": 1.5}, "`warmup` must be from 0 to 1, not `1.5`"),
    ],
)
def test_words_that_cannot_be_meant(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_stage(1, "prompt", options)
    assert refused.value.message == f"stage 1 (prompt): {told}"


def test_no_text(forks: Forks, rounded: Path, tmp_path: Path) -> None:
    _refused(forks, 2, "there is no text to learn from", rounded, tmp_path / "out", hint="give `--text FILE`")


@pytest.mark.parametrize(
    ("written", "told", "hint"),
    [
        (" \n", "`...text.txt` has no document", ""),
        ("Once upon a time", "the text is one short document, and none is left to choose the best step on", "--valid"),
        (f"Once.{END}Twice.", "the text has ... tokens to learn from, less than one window of 32", "--sequence-length"),
        (
            f"Once.{END}Once.",
            "the text is one short document, and none is left to choose the best step on",
            "more text",
        ),
    ],
)
def test_too_little_text(written: str, told: str, hint: str, forks: Forks, rounded: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(written)
    _refused(forks, 3, told, rounded, tmp_path / "out", *SMALL, "--text", text, hint=hint)


def test_a_text_that_cannot_be_read(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    asked = (rounded, tmp_path / "out", *SMALL)
    none = tmp_path / "none.txt"
    _refused(forks, 3, f"`{none}` cannot be read: no such file or directory", *asked, "--text", none)
    for more in (("--text", none), ("--text", text, "--validation-text", none)):
        none.write_bytes(b"abc\xff")
        _refused(forks, 3, f"`{none}` is not UTF-8: byte 3 is 0xff", *asked, *more)
    none.write_bytes(b"")
    _refused(forks, 3, f"`{none}` has no document", *asked, "--text", text, "--validation-text", none)
    _refused(forks, 2, "two options read standard input", *asked, "--text", "-", "--validation-text", "-")
    _refused(
        forks,
        3,
        "the validation text has every document of the text",
        *asked,
        "--text",
        text,
        "--validation-text",
        text,
    )


def test_a_tokenizer(forks: Forks, rounded: Path, text: Path, learned: Path, tmp_path: Path) -> None:
    """Missed before any work, and only where text is to be read."""
    bare = Path(shutil.copytree(rounded, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    told = f"`{bare}` has no tokenizer, and `prompt` needs one: there is none of ..."
    for asked in (
        (*SMALL, "--text", text),
        ("--steps", "0", "--init-text", "x"),
        (*SMALL, "--text", text, "--dry-run"),
    ):
        _refused(forks, 3, told, bare, tmp_path / "out", *asked, hint="tokenizer files beside its weights")
    assert forks.run("prompt", bare, tmp_path / "out", "--steps", "0", "--init", learned).code == 0


def test_a_teacher(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    asked = (rounded, tmp_path / "out", *SMALL, "--text", text, "--loss", "distill")
    own = "the model would be its own teacher"
    _refused(forks, 3, own, *asked, hint="`--teacher MODEL`")
    link = tmp_path / "link"
    link.symlink_to(rounded)
    _refused(forks, 3, own, *asked, "--teacher", link, hint="`--loss next-token`")
    none, wide = tmp_path / "none", make("llama", tmp_path / "wide", vocab_size=600)
    _refused(forks, 3, f"`{none}` is not there", *asked, "--teacher", none)
    told = f"the teacher `{wide}` has another vocabulary: 600 rows, not 512"
    for more in ((), ("--dry-run",)):
        _refused(forks, 3, told, *asked, "--teacher", wide, *more)
    bare = Path(shutil.copytree(STORIES, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    _refused(forks, 3, f"the teacher `{bare}` has no tokenizer", *asked, "--teacher", bare)
    other = Path(shutil.copytree(STORIES, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = f"the teacher `{other}` cuts the text into other tokens"
    _refused(forks, 3, told, *asked, "--teacher", other, hint="the tokenizer of the model that learns")


def test_past_the_positions(forks: Forks, rounded: Path, text: Path, deep: Path, tmp_path: Path) -> None:
    """stories260K has 512."""
    asked = (rounded, tmp_path / "out", "--text", text, "--steps", "2")
    told = "100 tokens of prompt and 413 of text are past the model's 512 positions"
    for more in ((), ("--dry-run",)):
        words = ("--tokens", "100", "--sequence-length", "413", *more)
        _refused(forks, 2, told, *asked, *words, hint="use `--sequence-length 412`")
    told = "511 tokens of prompt and 32 of text are past the model's 512 positions"
    _refused(forks, 2, told, *asked, "--tokens", "511", "--sequence-length", "32", hint="use fewer `--tokens`")
    told = "512 tokens of prompt leave no room for text in the model's 512 positions"
    _refused(forks, 2, told, *asked[:2], "--steps", "0", "--init-text", "x", "--tokens", "512")


def _spoiled(learned: Path, place: Path, how: str) -> Path:
    """A prompt's file with something wrong about it."""
    data, tensor = (learned / FOLDER / WEIGHTS).read_bytes(), attached(learned)
    if how == "truncated":
        place.write_bytes(data[:-10])
    elif how == "text":
        place.write_bytes(b"a prompt of old, as text")
    else:
        name = "prompt_encoder.default.embedding.weight" if how == "name" else TENSOR
        found: dict[str, Callable[[], torch.Tensor]] = {
            "integers": lambda: tensor.int(),
            "8 bits": lambda: tensor.to(torch.float8_e4m3fn),
            "narrow": lambda: tensor[:, :32].contiguous(),
            "empty": lambda: tensor[:0],
            "three axes": lambda: tensor[None],
            "not finite": lambda: tensor.clone().index_put_(
                (torch.tensor([2]), torch.tensor([3])), torch.tensor(torch.nan)
            ),
        }
        save_file({name: found.get(how, lambda: tensor)()}, place)
    return place


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("truncated", "`{}`: tensor `prompt_embeddings` ends at byte 1024 of 1014"),
        ("text", "`{}`..."),
        ("name", "`{}` has no tensor `prompt_embeddings`"),
        ("integers", "`prompt_embeddings` in `{}` is I32 [4, 64], not rows of floats"),
        ("8 bits", "`prompt_embeddings` in `{}` is F8_E4M3 [4, 64], not rows of floats"),
        ("narrow", "the prompt `{}` is 32 wide, and the model takes 64"),
        ("empty", "`prompt_embeddings` in `{}` is F32 [0, 64], not rows of floats"),
        ("three axes", "`prompt_embeddings` in `{}` is F32 [1, 4, 64], not rows of floats"),
        ("not finite", "the prompt `{}` has values that are not finite"),
    ],
)
def test_a_start_that_is_no_prompt(
    how: str, told: str, forks: Forks, rounded: Path, text: Path, learned: Path, tmp_path: Path
) -> None:
    file = _spoiled(learned, tmp_path / "start.safetensors", how)
    learning = ("--steps", "2", "--text", text, "--sequence-length", "32")
    for asked in (("--steps", "0"), learning) if how == "not finite" else (("--steps", "0"),):
        _refused(forks, 3, told.format(file), rounded, tmp_path / "out", "--init", file, *asked)


def test_a_start_that_is_not_there(forks: Forks, rounded: Path, learned: Path, tmp_path: Path) -> None:
    asked = (rounded, tmp_path / "out", "--steps", "0", "--init")
    none = tmp_path / "none.safetensors"
    _refused(forks, 3, f"`{none}` cannot be read: no such file or directory", *asked, none)
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (folder, rounded):
        _refused(forks, 3, f"`{place}` has no prompt", *asked, place, hint="`attachments/prompt/`")
    config = folder / "adapter_config.json"
    save_file({TENSOR: attached(learned)}, folder / WEIGHTS)
    for kind in ("LORA", "P_TUNING", None):
        config.write_text(json.dumps({"peft_type": kind, "r": 8}))
        told = f"`{config}` is of type `{kind}`, not one of PROMPT_TUNING, PREFIX_TUNING"
        _refused(forks, 3, told, *asked, folder)
    config.write_text("{")
    _refused(forks, 3, f"`{config}` is not JSON...", *asked, folder)
    config.unlink()
    assert forks.run("prompt", *asked, folder).code == 0


def test_a_start_that_does_not_fit_the_options(
    forks: Forks, rounded: Path, tiny: Callable[[str], Path], text: Path, learned: Path, deep: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    told = f"`--init {learned}` has 4 tokens, not 7"
    _refused(forks, 2, told, rounded, dst, "--steps", "0", "--init", learned, "--tokens", "7", hint="`--tokens`")
    learn = ("--text", text, "--steps", "2", "--sequence-length", "32")
    told = f"`{deep}` has keys and values for every layer"
    _refused(forks, 2, told, rounded, dst, *learn, "--init", deep, hint="use `--depth all`")
    told = f"the prompt `{deep}` is 320 wide, and the model takes 128"
    _refused(forks, 3, told, tiny("gpt2"), dst, "--steps", "0", "--init", deep)
    told = "`--depth all` does not work with sliding windows of attention"
    _refused(forks, 2, told, tiny("mistral"), dst, *SMALL, "--text", text, "--depth", "all", hint="use `--depth input`")
    prompt(tiny("llama"), tmp_path / "twin", text, steps=1, depth="all")
    told = f"`{tmp_path / 'twin'}` has keys and values for every layer, which do not work with sliding windows of..."
    _refused(forks, 3, told, tiny("mistral"), dst, "--steps", "0", "--init", tmp_path / "twin")


def test_an_embedding_with_more_rows(forks: Forks, rounded: Path, learned: Path, text: Path, tmp_path: Path) -> None:
    """Eight were added since the prompt was learned."""
    src = Path(shutil.copytree(rounded, tmp_path / "src"))
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "vocab_size": 520}))

    def resize(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = torch.cat([tensors[name], tensors[name][:8]])

    change(src, resize)
    told = (
        f"the prompt `{learned}` was learned on another model: its base has 512 rows of embedding, and this one has 520"
    )
    for asked in (
        ("--steps", "0"),
        ("--text", text, "--steps", "2", "--sequence-length", "32"),
        ("--steps", "0", "--dry-run"),
    ):
        _refused(forks, 3, told, src, tmp_path / "out", "--init", learned, *asked, hint="`--any-base`")
    ended = forks.run("prompt", src, tmp_path / "out", "--init", learned, "--steps", "0", "--any-base")
    assert ended.code == 0, ended.err
    assert "warning: the prompt" in ended.err
    assert "its base has 512 rows of embedding" in ended.err
    assert torch.equal(attached(tmp_path / "out"), attached(learned))
    assert evaluate(tmp_path / "out", text=text, sequence_length=32)["prompt_tokens"] == 4, "it is this model's now"


def test_another_embedding_of_the_same_size(forks: Forks, rounded: Path, learned: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(rounded, tmp_path / "src"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][7, 5] += 1

    change(src, edit)
    told = f"the prompt `{learned}` was learned on another model: its base has another embedding of the same size"
    asked = ("--init", learned, "--steps", "0")
    _refused(forks, 3, told, src, tmp_path / "out", *asked, hint="`--any-base`")
    ended = forks.run("prompt", src, tmp_path / "out", *asked, "--any-base")
    assert (ended.code, ended.err.count("another embedding of the same size")) == (0, 1)


@pytest.mark.parametrize(
    ("steps", "told"),
    [("2", "on the validation text is not finite"), ("9", "of tuning the prompt is not finite at step 1")],
)
def test_a_loss_that_is_not_finite(
    steps: str, told: str, forks: Forks, rounded: Path, text: Path, tmp_path: Path
) -> None:
    """A step takes the prompt past what 16 bits reach; it is the next look that tells, or the next step."""
    asked = (*SMALL, "--text", text, "--learning-rate", "1e6", "--dtype", "f16", "--steps", steps)
    _refused(forks, 5, f"the loss {told}", rounded, tmp_path / "out", *asked, hint="`--dtype f32`")


def test_a_family_that_is_not_known(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(rounded, tmp_path / "src"))
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    told = "model type `mamba` is not one that `prompt` takes"
    _refused(forks, 3, told, src, tmp_path / "out", *SMALL, "--text", text, hint="known: ")
    (src / "config.json").unlink()
    _refused(forks, 3, f"`{src}` has no `config.json`", src, tmp_path / "out", *SMALL, "--text", text)


def test_a_chain_is_refused_before_its_first_stage(forks: Forks, learned: Path, text: Path, tmp_path: Path) -> None:
    """What the prompt's stage lacks is said before anything is compressed."""
    wide = make("llama", tmp_path / "wide", vocab_size=600)
    chain = ("compress", "--method", "rtn", "--group-size", "32", "+", "prompt", *SMALL[2:])
    for more, code, told in (
        (
            ("--text", text, "--sequence-length", "510", "--tokens", "9"),
            2,
            "9 tokens of prompt and 510 of text are past",
        ),
        (("--text", text, "--init", learned / "config.json"), 3, ""),
        (("--text", text, "--loss", "mix", "--teacher", wide), 3, "has another vocabulary: 600 rows, not 512"),
        (("--text", tmp_path / "none"), 3, "cannot be read"),
    ):
        dst = tmp_path / "out"
        ended = forks.run("chain", STORIES, dst, *chain, *more)
        assert ended.code == code, ended.err
        assert told in ended.err
        assert beside(dst) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk(call: str, rounded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the state of Adam, or wherever it is first: nothing is there, and the same command goes on."""
    stage, dst = make_stage(1, "prompt", said(text, steps=2)), tmp_path / "out"
    done = []
    real = getattr(os, "fsync" if call == "fsync" else "replace")

    def full(*given: Any, **more: Any) -> Any:
        done.append(1)
        if len(done) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if call == "fsync" else "replace", full)
        with pytest.raises(StorageError, match="no space left") as refused:
            go(rounded, dst, stage)
    assert "free some space" in str(refused.value.hint)
    assert not dst.exists()
    go(rounded, dst, stage)
    assert beside(dst) == []


def test_room_is_looked_for_before_the_work(
    rounded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewright.formats.publish.free_bytes", lambda path: 100)
    with pytest.raises(StorageError, match=r"needs \d+ bytes and its disk has 100 free"):
        go(rounded, tmp_path / "out", make_stage(1, "prompt", said(text, steps=2)))
    assert beside(tmp_path / "out") == []


def test_what_stands_there_is_not_replaced_unasked(forks: Forks, rounded: Path, text: Path, tmp_path: Path) -> None:
    prompt(rounded, tmp_path / "out", text, steps=1)
    ended = forks.run("prompt", rounded, tmp_path / "out", *words(text, steps=2))
    assert ended.code == 6
    assert "exists and differs: `--steps` was 1, is 2" in ended.err
    assert load_file(tmp_path / "out" / FOLDER / WEIGHTS)
