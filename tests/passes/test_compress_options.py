"""What the options of `compress` cannot mean together, or with a model, is refused before any work, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.errors import Refusal
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.errors import InputError, UsageError
from rewright.passes.pipeline import plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run

TEXT = {"calibration-text": "text"}


def asked(**said: Any) -> CompressOptions:
    """Options as a command line says them, with a text unless it is said to be missing."""
    plain = {**TEXT, **{key.replace("_", "-"): value for key, value in said.items()}}
    options = make_stage(1, "compress", {key: value for key, value in plain.items() if value is not None}).options
    assert isinstance(options, CompressOptions)
    return options


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"calibration_text": None}, "`--method gptq` needs `--calibration-text`"),
        ({"calibration_text": None, "method": "wanda", "sparsity": 0.5}, "`--method wanda` needs"),
        ({"pattern": "2:4", "sparsity": 0.3}, "`--pattern 2:4` zeroes 0.5 of the weights, `--sparsity` says 0.3"),
        ({"pattern": "2:4", "sparsity_for": "q_proj=0.3"}, "`--pattern 2:4` fixes the sparsity of every matrix"),
        ({"mask": "keep", "sparsity": 0.5}, "`--mask keep` takes the zeros of the source, so none can be asked for"),
        ({"mask": "keep", "pattern": "2:4"}, "`--mask keep` takes the zeros of the source"),
        ({"mask": "keep", "sparsity_for": "q_proj=0.3"}, "`--mask keep` takes the zeros of the source"),
        ({"order": "act", "sparsity": 0.5}, "`--order act` and pruning do not go together"),
        ({"order": "act", "pattern": "2:4"}, "`--order act` and pruning do not go together"),
        ({"order": "act", "sparsity_for": "q_proj=0.3"}, "`--order act` and pruning do not go together"),
        ({"mask_block": 32}, "`--mask-block` says where new zeros are chosen, and none are asked for"),
        ({"saliency": "quant-aware", "sparsity": 0.5}, "`--saliency quant-aware` is of a sweep that chooses zeros"),
        ({"saliency": "quant-aware", "mask": "sweep"}, "`--saliency quant-aware` is of a sweep that chooses zeros"),
        ({"method": "rtn", "order": "act"}, "`--order` goes with `--method gptq` alone, not with `rtn`"),
        ({"bits": 3.5}, "`--bits 3.5` can only be an average: a matrix has 2, 3, 4, 8 or 16"),
        ({"bits": 5}, "`--bits 5` can only be an average: a matrix has 2, 3, 4, 8 or 16"),
        ({"bits": 16}, "`--bits 16` without `--sparsity` leaves nothing to do"),
        ({"bits": 16, "sparsity": 0}, "`--bits 16` without `--sparsity` leaves nothing to do"),
        ({"bits": 16, "budget": "measured", "pattern": "2:4"}, "`--budget measured` has nothing to deal out"),
        ({"bits": 16, "budget": "measured", "bits_for": "q_proj=4"}, "`--budget measured` has nothing to deal out"),
        ({"method": "magnitude"}, "`--method magnitude` prunes, and no `--sparsity` is asked for"),
        ({"method": "wanda"}, "`--method wanda` prunes, and no `--sparsity` is asked for"),
        ({"method": "rtn", "budget": "measured"}, "`--budget` goes with `--method gptq` alone, not with `rtn`"),
        ({"method": "rtn", "tune": 3}, "`--tune` goes with `--method gptq` alone, not with `rtn`"),
        ({"method": "wanda", "sparsity": 0.5, "polish": 3}, "`--polish` goes with `--method gptq` alone"),
    ],
    ids=str,
)
def test_what_does_not_go_together(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        asked(**said)
    assert "\n" not in caught.value.message


def test_activation_order_is_refused_beside_pruning_with_the_reason() -> None:
    with pytest.raises(UsageError) as caught:
        asked(order="act", sparsity=0.5)
    assert "cost more than the order wins" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 9}, "`bits` must be 2, 3, 4, 8, 16 or an average between 2 and 8, not `9`"),
        ({"bits": 1.9}, "`bits` must be 2, 3, 4, 8, 16 or an average"),
        ({"bits": "nan"}, "`bits` must be 2, 3, 4, 8, 16 or an average"),
        ({"bits": 12}, "`bits` must be 2, 3, 4, 8, 16 or an average"),
        ({"bits_for": "q_proj"}, "`bits-for` must be a regular expression, `=` and a number, not `q_proj`"),
        ({"bits_for": "=4"}, "`bits-for` must be a regular expression, `=` and a number"),
        ({"bits_for": "q_proj=5"}, "`bits-for` must end in `=2`, `=3`, `=4`, `=8` or `=16`, not in `=5`"),
        ({"bits_for": "(=4"}, "`bits-for` `(` is not a regular expression"),
        ({"sparsity_for": "q_proj=1"}, "`sparsity-for` must end in a share from 0 to below 1, not in `=1`"),
        ({"sparsity_for": "q_proj=half"}, "`sparsity-for` must end in a share"),
        ({"sparsity_for": "q_proj=nan"}, "`sparsity-for` must end in a share"),
        ({"sparsity": 1}, "`sparsity` must be from 0 to 0.99"),
        ({"pattern": "4:4"}, "`pattern` must be `unstructured` or `N:M` with 0 < N < M"),
        ({"mask_block": 0}, "`mask-block` must be at least 1"),
        ({"refine": -1}, "`refine` must be from 0 to 100"),
        ({"refine": 101}, "`refine` must be from 0 to 100"),
        ({"tune": -1}, "`tune` must be at least 0"),
        ({"polish": -1}, "`polish` must be at least 0"),
        ({"damp": 1.1}, "`damp` must be from 0 to 1"),
        ({"target": "both"}, "`target` must be one of dense, own"),
        ({"mask": "obs"}, "`mask` must be one of admm, sweep, keep"),
        ({"saliency": "none"}, "`saliency` must be one of quant-aware, obs"),
        ({"clip": "max"}, "`clip` must be one of hdiag, mse, minmax"),
        ({"order": "desc"}, "`order` must be one of natural, act"),
        ({"sequential": "model"}, "`sequential` must be one of module, layer"),
        ({"budget": "even"}, "`budget` must be one of flat, measured"),
    ],
    ids=str,
)
def test_what_no_option_can_be(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        asked(**said)


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 16, "sparsity": 0.3},
        {"bits": 16, "sparsity_for": "q_proj=0.3"},
        {"bits": 16, "bits_for": "q_proj=4"},
        {"bits": 16, "mask": "keep"},
        {"bits": 3.5, "budget": "measured"},
        {"budget": "measured"},
        {"bits": 16, "sparsity": 0.5, "budget": "measured"},
        {"bits": 2.5, "sparsity": 0.5, "budget": "measured", "tune": 3, "polish": 3},
        {"pattern": "16:32", "sparsity": 0.5},
        {"order": "act", "sparsity": 0},
        {"order": "act", "mask": "keep"},
        {"order": "act", "sparsity_for": "q_proj=0"},
        {"method": "magnitude", "sparsity_for": "q_proj=0.3", "calibration_text": None},
        {"method": "rtn", "calibration_text": None, "mask": "keep"},
    ],
    ids=str,
)
def test_what_does_go_together(said: dict[str, Any]) -> None:
    asked(**said)


def _planned(src: Path, **said: Any) -> list[dict[str, Any]]:
    plain = {key.replace("_", "-"): value for key, value in said.items()}
    stage = make_stage(1, "compress", {"method": "rtn", **plain})
    found = plan(Run(src, Path("/nowhere/out"), (stage,), RunOptions()))["stages"][0]["details"]["matrices"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"skip": "q_prj"}, "`--skip q_prj` matches no matrix"),
        ({"bits_for": "q_prj=4"}, "`--bits-for q_prj=4` matches no matrix"),
        ({"sparsity_for": "q_prj=0.25"}, "`--sparsity-for q_prj=0.25` matches no matrix"),
        ({"bits_for": ["q_proj=4", "embed_tokens=8"]}, "`--bits-for embed_tokens=8` matches no matrix"),
        # a matrix that is left alone is none that could be given bits
        ({"skip": "q_proj", "bits_for": "q_proj=4"}, "`--bits-for q_proj=4` matches no matrix"),
        ({"pattern": "3:7"}, "`--pattern 3:7` does not divide the 64 columns of"),
        ({"pattern": "32:64", "skip": ["self_attn"]}, "`--pattern 32:64` does not divide the 32 columns of"),
    ],
    ids=str,
)
def test_what_a_model_has_no_place_for(said: dict[str, Any], message: str, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        _planned(tiny("llama"), **said)
    assert caught.value.hint


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "31:32", "1:2"])
def test_any_pattern_that_divides_the_width(pattern: str, tiny: Callable[[str], Path]) -> None:
    keep, of = map(int, pattern.split(":"))
    assert {row["sparsity"] for row in _planned(tiny("llama"), pattern=pattern)} == {1 - keep / of}


def test_of_words_for_one_matrix_the_last_counts(tiny: Callable[[str], Path]) -> None:
    """Matrices that no word is about have what is asked of all."""
    words = {"bits": 8, "sparsity": 0.1, "bits_for": ["self_attn=4", "[qk]_proj=16"]}
    rows = _planned(tiny("llama"), **words, sparsity_for=["mlp=0.5", "layers.1.*up_proj=0"])
    found = {
        (row["name"].split(".*.")[1], row["bits"], row["group_size"], row["sparsity"]): row["layers"] for row in rows
    }
    assert found == {
        ("self_attn.q_proj.weight", 16, None, 0.1): 2,
        ("self_attn.k_proj.weight", 16, None, 0.1): 2,
        ("self_attn.v_proj.weight", 4, 32, 0.1): 2,
        ("self_attn.o_proj.weight", 4, 32, 0.1): 2,
        ("mlp.gate_proj.weight", 8, 32, 0.5): 2,
        ("mlp.down_proj.weight", 8, 64, 0.5): 2,
        ("mlp.up_proj.weight", 8, 32, 0.5): 1,
        ("mlp.up_proj.weight", 8, 32, 0.0): 1,
    }


def test_refusals_say_what_works_instead(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(InputError) as caught:
        _planned(tiny("gpt2"))
    assert "--format dense" in str(caught.value.hint)
    assert _planned(tiny("gpt2"), format="dense")
    for said in (
        {"order": "act", "sparsity": 0.5},
        {"bits": 3.5},
        {"bits": 16},
        {"mask": "sweep", "calibration_text": None},
    ):
        with pytest.raises(Refusal) as refused:
            asked(**said)
        assert refused.value.hint, said
