"""The picture beside a report, read back: its numbers are the report's, its words are apart, its bytes are settled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

from rewright.passes.compress import picture, table

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PHI = ("qkv_proj", "o_proj", "gate_up_proj")
EXPERTS = ("block_sparse_moe.experts.w1", "block_sparse_moe.experts.w2", "block_sparse_moe.experts.w3")
MANY = (*LLAMA, "shared_expert.gate_proj", "kv_a_proj_with_mqa", "attn.c_proj", *EXPERTS)
BLUE, VERMILION = "#0072B2", "#D55E00"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(
    kinds: tuple[str, ...], depth: int, *dealt: str, held_out: bool = True, span: float = 3, experts: int = 1
) -> dict[str, Any]:
    """A report with errors over `span` decades for some kinds of matrices in `depth` layers."""
    draw = random.Random(1)

    def errors() -> dict[str, float | None]:
        error = float(f"{1 + 8.9 * draw.random():.6f}e{-draw.randrange(math.ceil(span))}")
        return {"error_calibration": error, "error_held_out": error * (1 + draw.random()) if held_out else None}

    return {
        "options": {"bits": 4, "sparsity": 0.5, "pattern": "unstructured", "group-size": 32, "method": "gptq"}
        | {"tune": 0, "polish": 80},
        "kinds": [{"kind": kind} for kind in kinds],
        "matrices": [
            {"kind": kind, "layer": layer, "bits": draw.choice([2, 3, 4, 8]), "sparsity_asked": draw.random()}
            | errors()
            for layer in range(depth)
            for kind in kinds
            for _ in range(experts if "experts" in kind else 1)
        ],
        "layers": [{"layer": layer, **errors()} for layer in range(depth)],
        "budget": [{what: 0} for what in dealt],
    }


def read(told: dict[str, Any]) -> ET.Element:
    found = picture.draw(told)
    assert found is not None
    return ET.fromstring(found)


@dataclass(frozen=True)
class Words:
    """Words at a place in the picture, with the box that they take at 0.6 em a letter."""

    text: str
    x: float
    y: float
    box: tuple[float, float, float, float]


def words(element: ET.Element, x: float = 0, y: float = 0, **above: str) -> Iterator[Words]:
    """All words of an element, with what it has from the groups around it."""
    style = {**above, **element.attrib}
    if moved := element.get("transform"):
        across, down = moved.removeprefix("translate(").removesuffix(")").split()
        x, y = x + float(across), y + float(down)
    if element.tag == f"{NAMESPACE}text":
        x, y, size, text = x + float(style["x"]), y + float(style["y"]), float(style["font-size"]), element.text or ""
        long = 0.6 * size * len(text)
        left = x - long * {"start": 0, "middle": 0.5, "end": 1}[style.get("text-anchor", "start")]
        yield Words(text, x, y, (left, left + long, y - 0.75 * size, y + 0.22 * size))
    else:
        kept = {key: value for key, value in style.items() if key in ("font-size", "text-anchor")}
        for child in element:
            yield from words(child, x, y, **kept)


def panel_of(root: ET.Element, kind: str) -> ET.Element:
    return next(
        group
        for group in root.iter(f"{NAMESPACE}g")
        if (group.findtext(f"{NAMESPACE}title") or "").startswith(f"{kind}: ")
    )


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def straight(ends: list[tuple[float, float]], at: float) -> float:
    (a, first), (b, second) = ends[0], ends[-1]
    return first + (second - first) * (at - a) / (b - a)


def points(panel: ET.Element, colour: str) -> list[tuple[float, float]]:
    line = next(line for line in panel.iter(f"{NAMESPACE}polyline") if line.get("stroke") == colour)
    told = (point.split(",") for point in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in told]


SHAPES = [
    *((kinds, depth, dealt) for kinds in (LLAMA, PHI, MANY) for depth in (1, 2, 32, 80) for dealt in ((), ("bits",))),
    *((kinds, depth, ("sparsity", "bits")) for kinds in (LLAMA, MANY) for depth in (1, 2, 5, 20, 21, 32, 80, 126)),
    (LLAMA[:1], 4, ("bits",)),
]


@pytest.mark.parametrize(("kinds", "depth", "dealt"), SHAPES, ids=lambda value: str(value) if value != () else "flat")
@pytest.mark.parametrize("span", [1, 12])
def test_no_words_overlap(kinds: tuple[str, ...], depth: int, dealt: tuple[str, ...], span: float) -> None:
    root = read(drawn(kinds, depth, *dealt, span=span, experts=3))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = list(words(root))
    for told in found:
        left, right, top, bottom = told.box
        assert left >= 0, told
        assert right <= width, told
        assert top >= 0, told
        assert bottom <= height, told
    bands: dict[int, list[Words]] = {}
    for told in found:
        for band in range(int(told.box[2] // 20), int(told.box[3] // 20) + 1):
            bands.setdefault(band, []).append(told)
    for band_words in bands.values():
        for one, other in combinations(band_words, 2):
            apart = one.box[1] <= other.box[0] or other.box[1] <= one.box[0]
            assert apart or one.box[3] <= other.box[2] or other.box[3] <= one.box[2], (one, other)


@pytest.mark.parametrize("span", [1, 3, 9])
@pytest.mark.parametrize("depth", [2, 32])
def test_its_lines_are_the_errors(depth: int, span: float) -> None:
    told = drawn(LLAMA, depth, span=span)
    root = read(told)
    first = panel_of(root, "q_proj")
    high = [(word.y - 4, math.log10(float(word.text))) for word in _labels(first, "end", 0)]
    for kind in (*LLAMA, "whole layer"):
        panel = panel_of(root, kind)
        wide = [(word.x, float(word.text)) for word in _labels(panel, "middle", 150)]
        rows = told["layers"] if kind == "whole layer" else [r for r in told["matrices"] if r["kind"] == kind]
        for key, colour in (("error_held_out", BLUE), ("error_calibration", VERMILION)):
            found = points(panel, colour)
            assert [round(straight(wide, x), 1) for x, _ in found] == [row["layer"] for row in rows]
            errors = [straight(high, y) for _, y in found]
            assert errors == pytest.approx([math.log10(row[key]) for row in rows], abs=0.005 * (span + 1))
            mean = sum(row[key] for row in rows) / depth
            assert any(number(word.text) == pytest.approx(mean, rel=0.05) for word in words(panel))


def _labels(panel: ET.Element, anchor: str, below: float) -> list[Words]:
    """The numbers along a panel's axis, in the panel's own coordinates."""
    texts = [text for text in panel.findall(f"{NAMESPACE}text") if text.get("text-anchor") == anchor]
    found = [word for text in texts for word in words(text) if number(word.text) is not None]
    return [word for word in found if word.y > below and (anchor == "middle" or word.x < 0)]


def test_panels_share_an_axis() -> None:
    root = read(drawn(LLAMA, 4))
    grids = [
        [line.get("y1") for line in panel_of(root, kind).findall(f"{NAMESPACE}line") if line.get("x1") == "0"]
        for kind in (*LLAMA, "whole layer")
    ]
    assert len(grids[0]) > 2
    assert all(grid == grids[0] for grid in grids)


@pytest.mark.parametrize("kinds", [LLAMA, MANY])
@pytest.mark.parametrize("depth", [3, 40])
def test_its_tables_are_what_was_dealt(kinds: tuple[str, ...], depth: int) -> None:
    told = drawn(kinds, depth, "sparsity", "bits", experts=2)
    root = read(told)
    for what, key, scale in (("zeros, %", "sparsity_asked", 100), ("bits", "bits", 1)):
        name = f"dealt by the measured budget: {what}"
        group = next(g for g in root.iter(f"{NAMESPACE}g") if name in [t.text for t in g.findall(f"{NAMESPACE}text")])
        boxes, figures = group.findall(f"{NAMESPACE}g")
        dealt: dict[tuple[str, int], list[float]] = {}
        for row in told["matrices"]:
            dealt.setdefault((row["kind"], row["layer"]), []).append(scale * row[key])
        means = {place: sum(values) / len(values) for place, values in dealt.items()}
        wanted = [means[kind, layer] for kind in kinds for layer in range(depth)]
        places = sorted((float(text.attrib["y"]), float(text.attrib["x"]), text.text or "") for text in figures)
        assert [float(figure) for *_, figure in places] == pytest.approx(wanted, abs=0.51 if scale == 100 else 0.06)
        darkest = min(boxes, key=lambda box: int(box.attrib["fill"][1:], 16))
        assert darkest.get("fill") == table.MUCH
        assert len(boxes) == len(wanted)


def test_no_picture_of_nothing() -> None:
    told = drawn(LLAMA, 2)
    for row in (*told["matrices"], *told["layers"]):
        row.update(error_calibration=None, error_held_out=None)
    assert picture.draw(told) is None


def test_an_error_of_nothing_has_no_place_on_the_axis() -> None:
    told = drawn(LLAMA, 2)
    told["matrices"][0].update(error_calibration=0.0, error_held_out=math.inf)
    root = read(told)
    panel = panel_of(root, "q_proj")
    assert not list(panel.iter(f"{NAMESPACE}polyline"))
    assert [dot.get("fill") for dot in panel.iter(f"{NAMESPACE}circle")] == [BLUE, VERMILION]


def test_a_kind_without_errors_says_so() -> None:
    told = drawn(PHI, 3)
    for row in told["matrices"]:
        if row["kind"] == "o_proj":
            row.update(error_calibration=None, error_held_out=None)
    found = [word.text for word in words(panel_of(read(told), "o_proj"))]
    assert "not measured" in found
    assert "mean" not in found


def test_calibration_alone() -> None:
    root = read(drawn(LLAMA, 3, held_out=False))
    found = [word.text for word in words(root)]
    assert "calibration text" in found
    assert "the other kinds" in found
    assert "held-out text" not in found
    assert not [line for line in root.iter(f"{NAMESPACE}polyline") if line.get("stroke") == BLUE]


def test_it_tells_itself_to_who_does_not_see_it() -> None:
    root = read(drawn(LLAMA, 3, "bits"))
    assert root.get("role") == "img"
    named = [root.find(f"{NAMESPACE}*[@id='{name}']") for name in root.attrib["aria-labelledby"].split()]
    title, description = (element.text or "" for element in named if element is not None)
    assert title.startswith("Error of each layer's matrices")
    assert description.startswith(
        "4 bits on average, 50 % zeros, groups of 32, gptq, polish 80. Means over layers 0 to 2"
    )
    assert all(f"{kind} " in description for kind in LLAMA)
    assert {use.get("href") for use in root.iter(f"{NAMESPACE}use")} == {f"#kind-{place}" for place in range(7)}


def test_names_are_words_and_never_markup() -> None:
    kinds = ('</text><script>alert(1)</script>"', "a' onload='x&lt;\x00\ud800\u202e]]>", "<!--" + "名" * 300)
    root = read(drawn(kinds, 3, "sparsity", "bits"))
    allowed = ["svg", "title", "desc", "rect", "text", "line", "polyline", "circle", "defs", "use", "g"]
    assert {element.tag.removeprefix(NAMESPACE) for element in root.iter()} <= set(allowed)
    assert not [key for element in root.iter() for key in element.attrib if key.startswith("on")]
    assert kinds[0] in [word.text for word in words(root)]
    assert panel_of(root, "a' onload='x&lt;\ufffd\ufffd\ufffd]]>") is not None
    assert not [word.text for word in words(root) if len(word.text) > 110]


def test_equal_reports_give_equal_bytes_and_nothing_heavy_is_loaded() -> None:
    told = drawn(LLAMA, 4, "sparsity")
    first = picture.draw(told)
    assert first is not None
    code = (
        "import sys, json, hashlib; from rewright.passes.compress import picture\n"
        "print(hashlib.sha256(picture.draw(json.load(sys.stdin))).hexdigest())\n"
        "print(*sorted({'torch', 'numpy', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(told),
        env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [hashlib.sha256(first).hexdigest(), ""]
