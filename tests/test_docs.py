"""The pages are true: generated parts are current, links lead somewhere, examples parse, named files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewright.cli import chain, exits, root, usage
from rewright.passes import recipe
from rewright.passes.errors import UsageError
from rewright.passes.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "tests/data/README.md", *DOCS.rglob("*.md")],
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
FOLDERS = ("cli", "passes", "kernels", "formats", "tests", "docs", ".ci")
WRITTEN = {"docs/results", "docs/bench"}  # by benchmarks, when somebody runs them
NAMED = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*)`")


def _label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fences(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield found[2], "\n".join(line.removeprefix(found[1]) for line in found[3].splitlines())


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """The identifiers that the site gives to a page's headings."""
    found = set()
    for title in re.findall(r"^#+ +(.+)$", _prose(page), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def _commands(text: str) -> Iterator[list[str]]:
    """The `rewright` command lines of a block, as words; what the shell does with the rest is not looked at."""
    variables = dict(re.findall(r"^(\w+) :?= (.*)$", text, re.MULTILINE))
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), line.strip())
        line = re.sub(r"\$[(]@D[)]|\$[@<^]", "path", line)
        if not line.removeprefix("$ ").startswith(("rewright ", "python -m rewright ")):
            continue
        lexer = shlex.shlex(line.removeprefix("$ ").removeprefix("python -m "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;<>"):
                break
            words.append(word)
        yield words[1:]


def _parse(words: list[str]) -> None:
    """Let the command line read an example. Raises UsageError where it would be refused; nothing runs."""
    app = root.build()
    known = [command.name for command in app.registered_commands if command.name]
    parsed: Any = usage.parse(app, words, prog="rewright", known=known)
    if isinstance(parsed, partial) and parsed.func is chain.chain:
        for number, stage in enumerate(chain.split(parsed.keywords["stages"]), start=1):
            chain.stage_of(number, stage)


def test_generated_parts_are_current() -> None:
    assert not [_label(page) for page in _reference().stale()], "run `make docs`"


def test_generated_parts_are_used() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in _reference().blocks() if f"<!-- begin {name} -->" not in text]


@pytest.mark.parametrize("name", SPECS)
def test_every_pass_has_a_page(name: str) -> None:
    page = (DOCS / "passes" / f"{name}.md").read_text(encoding="utf-8")
    assert f"<!-- begin options {name} -->" in page
    assert f"passes/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    own = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {name for name in own if not name.startswith(("results/", "bench/"))} <= listed
    assert listed <= own


@pytest.mark.parametrize("page", PAGES, ids=_label)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(_prose(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=_label)
def test_named_files_exist(page: Path) -> None:
    named = {name.rstrip("/") for name in NAMED.findall(_prose(page))} - WRITTEN
    assert not [name for name in named if not any(ROOT.glob(name))]


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in _fences(page))], ids=_label)
def test_examples_parse(page: Path) -> None:
    for language, text in _fences(page):
        if language in ("console", "sh", "bash", "make", "yaml"):
            for words in _commands(text):
                _parse(words)
        elif language == "toml" and "[[stage]]" in text:
            recipe.parse(text)
        elif language == "python":
            compile(text, _label(page), "exec")


def test_the_check_of_examples_can_fail() -> None:
    words = list(_commands("$ rewright chain a b compress --method rtn \\\n    + compress --bit 3 | jq .stages\n"))
    assert words == [["chain", "a", "b", "compress", "--method", "rtn", "+", "compress", "--bit", "3"]]
    with pytest.raises(UsageError, match=r"stage 2 \(compress\): no option `--bit`"):
        _parse(words[0])


def test_help_examples_parse() -> None:
    for name, command in _reference().commands().items():
        lines = [line for line in str(command.help).split("\n\n") if line.startswith("Example: ")]
        assert lines, f"`{name}` shows no example"
        for words in _commands(" ".join(lines[0].removeprefix("Example: ").split())):
            _parse(words)


def test_every_exit_code_is_explained() -> None:
    page = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert codes <= told


def test_the_readme_begins_with_the_two_commands() -> None:
    blocks = list(_fences(ROOT / "README.md"))
    assert [line.split("#")[0].strip() for line in blocks[0][1].splitlines()] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)
