"""The models that `tests.bench.convert_memory` converts, in small, and its page."""

from __future__ import annotations

from pathlib import Path

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.convert.output import LOADED, estimate
from rewright.passes.spec import Layout
from tests.bench import convert_memory
from tests.passes.converting import convert


def test_the_models_convert_in_every_direction(tmp_path: Path) -> None:
    convert_memory.write_packed(tmp_path / "pack-quantized", 128, 256, 40)
    made = convert(tmp_path / "pack-quantized", tmp_path / "bitmask-w4", "bitmask-w4")
    assert made["stages"][0]["metrics"]["kept"] == 0.5
    for form, to in convert_memory.WAYS:
        convert(tmp_path / form, tmp_path / f"{form}-{to}", to)
    # loaded once, then for the largest matrix 18 bytes a code on its way, its 16 bits, and a scale of 16 a group
    source = Layout.of(Checkpoint.open(tmp_path / "pack-quantized"))
    codes = 128 * 256
    said = estimate("dense", source).peak_host_bytes
    assert said == LOADED + 18 * codes + 2 * codes + 2 * codes // 128
    assert estimate("pack-quantized", source).peak_host_bytes < LOADED


def test_the_page_has_what_was_foretold_beside_what_was() -> None:
    row = {"hidden": 1, "ffn": 2, "vocabulary": 3, "from": "a", "to": "b", "foretold_mib": 44.0, "mib": 40.0}
    said = convert_memory.page({"idle_mib": 400.0, "rows": [row], "machine": {"device": "x"}, "command": "c"})
    assert "| 1 | 2 | 3 | `a` | `b` | 44 | 40 | +10 % |" in said
