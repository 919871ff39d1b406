"""Recurrences in StripedHyena's layout and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewright.formats.errors import Refusal
from rewright.passes.striped import from_striped
from tests.passes.casting import stored
from tests.passes.conftest import STORIES
from tests.passes.converting import config, convert
from tests.passes.hyenas import modal, small

STEM = "hyena.backbone.layers.1.mixer"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "src"
    small("hyenadna", taps=0).save_pretrained(folder)
    return folder


def test_there_and_back(distilled: Path, tmp_path: Path) -> None:
    convert(distilled, tmp_path / "theirs", "stripedhyena-modal")
    convert(tmp_path / "theirs", tmp_path / "ours", "modal")
    assert stored(tmp_path / "ours") == stored(distilled)
    assert config(tmp_path / "ours") == config(distilled)

    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    own = {
        name.removeprefix(f"{STEM}.modal."): t.double().numpy()
        for name, t in load_file(distilled / "model.safetensors").items()
        if name.startswith(f"{STEM}.modal.")
    }
    poles, residues = (
        torch.view_as_complex(theirs[f"{STEM}.filter.{leaf}"][:, :, 0].clone()) for leaf in ("poles", "residues")
    )
    assert theirs[f"{STEM}.filter.poles"].shape == (12, 2, 1, 2)
    powers = torch.where(poles[..., None] == 0, 0, poles[..., None]) ** torch.arange(1, 30)
    response = torch.cat([residues[..., None], residues[..., None] * powers], 2).sum(1).real
    response[:, 0] += theirs[f"{STEM}.filter.D"]
    assert torch.allclose(response, torch.from_numpy(modal(own, 30)), atol=1e-9)


def test_what_the_loader_of_stripedhyena_reads(distilled: Path, tmp_path: Path) -> None:
    """Complex [state, D] by block, from 1 on; it makes [D, state, 1, 2] of them."""
    convert(distilled, tmp_path / "out", "stripedhyena-modal")
    held = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in ("poles", "residues"):
        read = load_file(tmp_path / "out" / "attachments" / "stripedhyena" / f"approx_{leaf}_2.safetensors")[leaf]
        made = torch.view_as_real(read).permute(1, 0, 2).unsqueeze(-2)
        assert torch.equal(made, held[f"{STEM}.filter.{leaf}"].float())


def test_another_s_recurrences_come_back(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    size, turn = torch.rand(2, 6, 3, generator=draw).unbind()
    planes = torch.view_as_real(torch.polar(0.3 + 0.69 * size, 3 * turn))[:, :, None]
    held = {
        "blocks.0.filter.poles": planes.contiguous(),
        "blocks.0.filter.residues": torch.randn(6, 3, 1, 2, generator=draw),
        "blocks.0.filter.D": torch.randn(6, generator=draw),
        "norm.scale": torch.ones(3),
    }
    (tmp_path / "src").mkdir()
    save_file(held, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model_type": "stripedhyena", "state_size": 3}))
    convert(tmp_path / "src", tmp_path / "ours", "modal")
    assert config(tmp_path / "ours")["modal"]["entries"] == [3]
    convert(tmp_path / "ours", tmp_path / "theirs", "stripedhyena-modal")
    assert stored(tmp_path / "theirs") == stored(tmp_path / "src")


def test_a_pole_of_zero_is_a_tap_at_the_start_alone() -> None:
    poles = torch.tensor([[[0.0, 0.0], [0.5, 0.1]]], dtype=torch.float64)
    residues = torch.tensor([[[2.0, 0.0], [1.0, -0.5]]], dtype=torch.float64)
    made, h0 = from_striped(poles, residues, torch.tensor([0.25], dtype=torch.float64))
    assert float(h0) == 0.25 + 2.0 + 1.0
    # h_1 = Re sum of residues in our convention: Re of R p of the second entry, and nothing of the first
    assert float(made[..., 0].sum()) == pytest.approx(1.0 * 0.5 + 0.5 * 0.1)


def test_a_pole_of_zero_that_would_not_come_back_is_refused(tmp_path: Path) -> None:
    held = {
        "blocks.0.filter.poles": torch.tensor([[[[0.0, 0.0]], [[0.5, 0.1]]]]),
        "blocks.0.filter.residues": torch.tensor([[[[2.0, 0.0]], [[1.0, 0.0]]]]),
        "blocks.0.filter.D": torch.zeros(1),
    }
    (tmp_path / "src").mkdir()
    save_file(held, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model_type": "stripedhyena", "state_size": 2}))
    with pytest.raises(Refusal, match="so near 0 that its residue does not come back"):
        convert(tmp_path / "src", tmp_path / "out", "modal")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"taps": 3}, "StripedHyena's layout has no `fir`"),
        ({}, "no recurrences are there to convert"),
    ],
)
def test_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    small("hyenadna", **given).save_pretrained(tmp_path / "src")
    with pytest.raises(Refusal, match=told):
        convert(tmp_path / "src", tmp_path / "out", "stripedhyena-modal")


def test_other_models_have_none(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no recurrences are there to convert"):
        convert(STORIES, tmp_path / "out", "modal")


def test_a_pole_that_is_next_to_nothing(tmp_path: Path) -> None:
    """Its residue would be lost in the other layout, and is not."""
    model = small("hyenadna", taps=0)
    with torch.no_grad():
        model.hyena.backbone.layers[0].mixer.modal.poles[3, 0] = torch.tensor([1e-30, 0.0])
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(Refusal, match=r"a pole of `hyena\.backbone\.layers\.0\.mixer` is so near 0"):
        convert(tmp_path / "src", tmp_path / "out", "stripedhyena-modal")
