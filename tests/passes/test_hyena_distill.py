"""`hyena-distill` from end to end: banks and models, orders, certificates, runs that are cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewright.passes.errors import BoundError
from rewright.passes.hyena_distill import fits as fitting
from rewright.passes.hyena_distill import plan as planning
from rewright.passes.hyena_distill.report import PICTURE
from rewright.passes.loading import load
from tests.passes.conftest import STORIES, TOKENIZER
from tests.passes.distilling import bank, distill, dry, report, waves, words
from tests.passes.forks import Forks, Strike
from tests.passes.hyenas import KINDS, logits, modal, small, tokens
from tests.passes.interruptions import raise_at
from tests.passes.outputs import beside, contents
from tests.passes.processes import Launched
from tests.passes.test_torchrun import same


def response(held: dict[str, torch.Tensor], name: str, length: int) -> torch.Tensor:
    """What a written recurrence is, by powers."""
    own = {key.removeprefix(f"{name}."): value.double().numpy() for key, value in held.items() if key.startswith(name)}
    return torch.from_numpy(modal(own, length))


@pytest.fixture(scope="module")
def wavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven filters of six states, the last of them the first again, two rough ones, and a tensor that is no bank."""
    own = waves(6, 3, 96)
    rough = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    return bank(path, wavy=torch.cat([own, own[:1]]), rough=rough, rate=torch.ones(3))


def test_a_bank(wavy: Path, tmp_path: Path) -> None:
    made, warnings = distill(wavy, tmp_path / "out", order=6)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (str(value.dtype), tuple(value.shape)) for name, value in held.items()} == {
        "rate": ("torch.float32", (3,)),
        "rough.h0": ("torch.float32", (2,)),
        "rough.poles": ("torch.float32", (2, held["rough.poles"].shape[1], 2)),
        "rough.residues": ("torch.float32", (2, held["rough.poles"].shape[1], 2)),
        "wavy.h0": ("torch.float64", (7,)),
        "wavy.poles": ("torch.float64", (7, 3, 2)),
        "wavy.residues": ("torch.float64", (7, 3, 2)),
    }
    source = load_file(wavy)
    assert (response(held, "wavy", 96) - source["wavy"]).norm() < 1e-9 * source["wavy"].norm()
    assert torch.equal(held["wavy.poles"][6], held["wavy.poles"][0])
    said = json.loads((tmp_path / "out" / "config.json").read_text())["filters"]
    assert said["wavy"] == {"length": 96, "entries": 3, "fir_head": 0, "states": [6] * 7}
    assert max(said["rough"]["states"]) <= 6

    told = report(tmp_path / "out")
    wavy_row, rough = sorted(told["groups"], key=lambda row: -len(row["name"]) - (row["name"] == "rough"))
    rough, wavy_row = (wavy_row, rough) if wavy_row["name"] == "rough" else (rough, wavy_row)
    assert wavy_row["error"] < 1e-9
    assert wavy_row["order_that_tolerance_allows"] == 6
    true = (response(held, "rough", 96) - source["rough"])[:, 1:].norm() / source["rough"][:, 1:].norm()
    assert rough["error"] == pytest.approx(float(true), rel=1e-5)
    assert 0.1 < rough["bound"] <= rough["error"]
    assert rough["error_over_bound"] == pytest.approx(rough["error"] / rough["bound"])
    assert made["metrics"]["filters"] == 9
    assert made["metrics"]["bound"] <= made["metrics"]["error"]
    assert not warnings
    assert (tmp_path / "out" / PICTURE).read_text().startswith("<svg")


def test_a_head_of_taps_is_exact(wavy: Path, tmp_path: Path) -> None:
    distill(wavy, tmp_path / "out", order=6, fir_head=5, keep_filters=True)
    held, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(wavy)
    assert torch.equal(held["rough.fir"], source["rough"][:, 1:6])
    assert torch.equal(held["rough"], source["rough"])
    assert (response(held, "wavy", 96) - source["wavy"]).norm() < 1e-9 * source["wavy"].norm()


@pytest.mark.parametrize("method", ["gradient", "balanced", "modal"])
def test_baselines(method: str, wavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.passes.hyena_distill.fit.STEPS", 100)
    made, _ = distill(wavy, tmp_path / "out", order=4, method=method)
    best, _ = distill(wavy, tmp_path / "best", order=4)
    assert best["metrics"]["error"] <= 1.01 * made["metrics"]["error"] <= 1.01


def test_a_shorter_and_a_longer_horizon(wavy: Path, tmp_path: Path) -> None:
    source = load_file(wavy)["rough"]
    for horizon in (40, 160):
        distill(wavy, tmp_path / str(horizon), order=8, horizon=horizon)
        held = load_file(tmp_path / str(horizon) / "model.safetensors")
        wanted = torch.nn.functional.pad(source, (0, 64))[:, :horizon]
        wrong = (response(held, "rough", horizon) - wanted)[:, 1:].norm() / wanted[:, 1:].norm()
        row = next(row for row in report(tmp_path / str(horizon))["groups"] if row["name"] == "rough")
        assert row["error"] == pytest.approx(float(wrong), rel=1e-4)


def test_the_least_order_within_a_tolerance(wavy: Path, tmp_path: Path) -> None:
    made, warnings = distill(wavy, tmp_path / "out", order="auto", tolerance=1e-3)
    rows = {row["name"]: row for row in report(tmp_path / "out")["groups"]}
    assert (rows["wavy"]["order"], rows["rough"]["order"]) == (6, 32)
    assert rows["wavy"]["error"] < 1e-3
    assert warnings == ["1 groups miss the tolerance of 0.001 at the largest order, the first `rough`"]
    assert made["metrics"]["states"] == 32


@pytest.mark.parametrize("kind", KINDS)
def test_a_model(kind: str, tmp_path: Path) -> None:
    """The distilled model is the model, as near as its filters are; everything else is taken over."""
    small(kind).save_pretrained(tmp_path / "src")
    made, _ = distill(tmp_path / "src", tmp_path / "out", order=8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["modal"]["fir_head"] == 0
    assert all(count <= 8 for count in config["modal"]["states"])
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("src", "out"))
    assert not [name for name in after if ".filter_fn." in name]
    for name in set(after) & set(before):
        assert torch.equal(after[name], before[name])
    teacher, student = load(tmp_path / "src")[0], load(tmp_path / "out")[0]
    ids = tokens(2, 40)
    wanted, found = logits(teacher, ids, use_cache=False), logits(student, ids, use_cache=False)
    assert (found - wanted).norm() < 3 * (made["metrics"]["error"] + 1e-5) * wanted.norm()
    assert (logits(student, ids) - found).abs().max() < 1e-4


def test_a_text_decides(lettered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Orders rise until the logits are near enough, and the change of loss is told."""
    source, asked = lettered
    made, _ = distill(source, tmp_path / "out", order="auto", tolerance=0.1, **asked)
    told = report(tmp_path / "out")
    assert [step["logit_error"] for step in told["tried"]][-1] <= 0.1
    assert all(step["logit_error"] > 0.1 for step in told["tried"][:-1])
    assert len(told["tried"]) > 1
    assert abs(made["metrics"]["loss_change"]) < 0.1
    assert made["metrics"]["loss_change"] == pytest.approx(told["text"]["loss"] - told["text"]["loss_before"])
    assert 0 < made["metrics"]["logit_error"] < 0.15


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model that reads text, and options that name one."""
    folder = tmp_path_factory.mktemp("lettered")
    small("order 3", vocab_size=512, seed=3).save_pretrained(folder / "src")
    for file in TOKENIZER:
        shutil.copy(STORIES / file, folder / "src")
    story = folder / "text.txt"
    story.write_text((STORIES.parent / "tinystories_heldout.txt").read_text()[:20000])
    return folder / "src", {"calibration_text": [str(story)], "samples": 4, "sequence_length": 48}


def test_what_filters_meet_weighs_their_errors(lettered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Fits differ, and by the plain norm they are worse."""
    source, asked = lettered
    even, _ = distill(source, tmp_path / "even", order=2, refine=20, **asked)
    made, _ = distill(source, tmp_path / "out", order=2, refine=20, weighting="input-spectrum", **asked)
    assert made["metrics"]["error"] > even["metrics"]["error"]
    model = load(source)[0]
    ids = tokens(1, 40)
    seen: list[tuple[torch.Tensor, slice]] = []
    mixer = model.hyena.backbone.layers[0].mixer
    mixer.watch = lambda inputs, which: seen.append((inputs, which))
    logits(model, ids, use_cache=False)
    assert [which for _, which in seen] == [slice(0, None, 2), slice(1, None, 2)]
    assert all(tuple(inputs.shape) == (1, 1, 12, 40) for inputs, _ in seen)


def test_a_bound_that_is_missed(wavy: Path, tmp_path: Path) -> None:
    with pytest.raises(BoundError, match="error"):
        distill(wavy, tmp_path / "out", require=("error<0.01",), order=2)


def test_a_run_that_is_cut_short_goes_on(wavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST", 2)
    distill(wavy, tmp_path / "whole", order=6)
    real = fitting.write_file
    for call in (1, 2):
        with monkeypatch.context() as cut:
            raise_at(cut, fitting, "write_file", call)
            with pytest.raises(KeyboardInterrupt):
                distill(wavy, tmp_path / "out", order=6)
    done: list[int] = []
    monkeypatch.setattr(fitting, "write_file", lambda *args: done.append(1) or real(*args))
    distill(wavy, tmp_path / "out", order=6)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(done) == 4, "of five blocks, one was fitted before"
    assert beside(tmp_path / "out") == []


def test_killed(forks: Forks, wavy: Path, tmp_path: Path) -> None:
    assert forks.run(*words(wavy, tmp_path / "whole", order=4)).code == 0
    for number in (5, 12, 19, 26):
        assert forks.run(*words(wavy, tmp_path / "out", order=4), strike=Strike(number)).code == -9
    assert forks.run(*words(wavy, tmp_path / "out", order=4)).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_processes_write_equal_bytes(wavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST", 2)
    distill(wavy, tmp_path / "alone", order=4)
    blocks = "from rewright.passes.hyena_distill import plan\nplan.MOST = 2"
    code, _, err = Launched(tmp_path, 2, words(wavy, tmp_path / "out", order=4), blocks).wait()
    assert code == 0, err
    same(tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize("real", [False, True])
def test_striped_hyena_with_fewer_modes(real: bool, tmp_path: Path) -> None:
    """The layout stays: sum R p^t from t = 0 on, with D on top at 0; real modes stay real."""
    own = torch.Generator().manual_seed(2)
    decay, angle = torch.rand(2, 5, 6, generator=own).unbind()
    residues = torch.randn(5, 6, 2, generator=own)
    if real:
        decay, angle, residues[..., 1] = 0.01 + 0.3 * decay.sort(1).values, 0 * angle, 0.0
    else:
        decay, angle = 0.02 + 0.1 * decay, 3 * angle
    poles = torch.polar((-decay).exp(), angle)
    stem, skip = "backbone.blocks.1.filter", torch.randn(5, generator=own)
    held = {
        f"{stem}.poles": torch.view_as_real(poles)[:, :, None].contiguous(),
        f"{stem}.residues": residues[:, :, None],
    }
    if real:
        held = {f"{stem}.log_poles": -decay[..., None], f"{stem}.residues": residues[..., 0].contiguous()}
    held |= {f"{stem}.D": skip, "other.weight": torch.ones(2, 2)}
    (tmp_path / "src").mkdir()
    bank(tmp_path / "src" / "model.safetensors", **held)
    said = {"model_type": "stripedhyena2" if real else "stripedhyena", "state_size": 6, "max_seq_len": 200}
    (tmp_path / "src" / "config.json").write_text(json.dumps(said))

    made, _ = distill(tmp_path / "src", tmp_path / "out", order=4 if real else 12, refine=20)
    after = load_file(tmp_path / "out" / "model.safetensors")
    entries = 4 if real else 6
    shapes = {"log_poles": (5, entries, 1), "residues": (5, entries)} if real else {}
    shapes = shapes or {"poles": (5, 6, 1, 2), "residues": (5, 6, 1, 2)}
    assert {name.rpartition(".")[2]: tuple(t.shape) for name, t in after.items() if stem in name} == {
        **shapes,
        "D": (5,),
    }
    assert torch.equal(after["other.weight"], torch.ones(2, 2))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["state_size"] == entries

    def responses(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if real:
            logs, weights = tensors[f"{stem}.log_poles"][..., 0].double(), tensors[f"{stem}.residues"].double()
        else:
            logs = torch.view_as_complex(tensors[f"{stem}.poles"][:, :, 0].double().clone()).log()
            weights = torch.view_as_complex(tensors[f"{stem}.residues"][:, :, 0].double().clone())
        found = (weights[..., None] * (logs[..., None] * torch.arange(200)).exp()).sum(1)
        found = found if real else found.real
        found[:, 0] += tensors[f"{stem}.D"]
        return found

    before = responses(held)
    wrong = (responses(after) - before)[:, 1:].norm() / before[:, 1:].norm()
    assert float(wrong) == pytest.approx(made["metrics"]["error"], rel=0.05, abs=1e-6)
    assert wrong < (0.02 if real else 1e-5)
    assert torch.allclose(responses(after)[:, 0], before[:, 0], atol=1e-5)


def test_a_dry_run(wavy: Path) -> None:
    told = dry(wavy, order=6)
    assert told["details"]["filters"] == 9
    assert told["flops"] > 0
    assert told["output_bytes"] > 0
