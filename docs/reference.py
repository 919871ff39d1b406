"""The generated parts of the pages, from the registry and the command line's own parser.

In a page, what stands between `<!-- begin NAME -->` and `<!-- end -->` is replaced by the block of that name:

    python docs/reference.py            # refresh every page
    python docs/reference.py --check    # only name the pages that are out of date, and exit 1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

from rewright.cli import environment, exits, root
from rewright.cli.build import RUN_PANEL
from rewright.passes.models.families import FAMILIES, Family
from rewright.passes.registry import SPECS
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Field, Spec, fields_of

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- begin (?P<name>[a-z0-9 -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> dict[str, Any]:
    """The root app's commands by name, as the parser has them."""
    app: Any = typer.main.get_command(root.build())
    found: dict[str, Any] = app.commands
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(item) for item in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_argument(parameter: Any) -> bool:
    return getattr(parameter, "param_type_name", "") == "argument"


def _help(parameter: Any) -> str:
    return str(parameter.help or "").replace("\\[", "[")


def _takes(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
        return ""
    # a bar would end the table's cell
    return ", ".join(f"`{word}`" for word in parameter.metavar.split("|"))


def _default(parameter: Any) -> str:
    """The value an option has when it is not given; a flag is off."""
    value = parameter.default
    if value is True and parameter.secondary_opts:
        return f"`{parameter.opts[0]}`"
    return "" if value in (None, False, 0, ()) or not isinstance(value, str) else f"`{value}`"


def _flags(parameter: Any) -> str:
    return ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))


def _option_rows(parameters: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    for item in parameters:
        yield _flags(item), _takes(item), _default(item), _help(item)


_OPTION_HEAD = ("option", "takes", "default", "meaning")


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def passes() -> str:
    """Every pass in a line."""
    rows = ((f"[`{s.name}`](passes/{s.name}.md)", s.summary, s.gives, _linked(s.paper)) for s in SPECS.values())
    return table(("pass", "what it does", "gives", "paper"), rows)


def facts(spec: Spec) -> str:
    """What a spec says beside its options."""
    rows = [
        ("paper", _linked(spec.paper)),
        ("needs", ", ".join(sorted(spec.wants))),
        ("gives", spec.gives),
        ("a resume loses", f"at most one {spec.grain}"),
        ("model types", ", ".join(f"`{name}`" for name in sorted(spec.archs)) or "any"),
        ("version", spec.version),
    ]
    return table(("fact", "value"), rows)


def options(spec: Spec) -> str:
    """A pass's options; those that only change its speed say that they are not in the key."""
    parameters = {item.name: item for item in commands()[spec.name].params}
    rows = []
    for item in fields_of(spec.options):
        flags, takes, default, said = next(_option_rows([parameters[item.name]]))
        rows.append((flags, takes, default, said + _outside_key(item)))
    return table(_OPTION_HEAD, rows)


def _outside_key(item: Field) -> str:
    return " (not in the key)" if item.opt.affects == "speed" else ""


def run_options() -> str:
    """The options of a run, with whether they can change the result."""
    parameters = {item.name: item for item in commands()["chain"].params}
    rows = []
    for item in fields_of(RunOptions):
        cells = next(_option_rows([parameters[item.name]]))
        rows.append((*cells, "yes" if item.opt.affects == "result" else "no"))
    return table((*_OPTION_HEAD, "in the key"), rows)


def command_pages() -> str:
    """Every command: what it does, its arguments and its own options."""
    return "\n\n".join("\n\n".join(_command(name, command)) for name, command in commands().items())


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [item for item in command.params if _is_argument(item)]
    own = [item for item in command.params if not _is_argument(item)]
    shared = [item for item in own if item.rich_help_panel == RUN_PANEL]
    own = [item for item in own if item.rich_help_panel != RUN_PANEL]
    words = (item.metavar if item.required else f"[{item.metavar}]" for item in arguments)
    yield f"## {name}"
    yield f"`rewright {name} [OPTIONS] {' '.join(words)}".rstrip() + (" ...`" if name == "chain" else "`")
    about, _, after = str(command.help).partition("\n\nExample: ")
    example, _, after = after.partition("\n\n")
    yield about
    if example:
        yield f"```console\n$ {' '.join(example.split())}\n```"
    if arguments:
        yield table(("argument", "meaning"), ((f"`{item.metavar}`", _help(item)) for item in arguments))
    if name in SPECS:
        yield f"Its options are on the page of [`{name}`](../passes/{name}.md#options)."
    elif own:
        yield table(_OPTION_HEAD, _option_rows(own))
    if shared:
        listed = "all" if len(shared) == len(fields_of(RunOptions)) else ", ".join(_flags(item) for item in shared)
        yield f"[Run options](run-options.md): {listed}."


def switches() -> str:
    """The environment variables that are read."""
    return table(("variable", "meaning"), ((f"`{switch.name}`", switch.help) for switch in environment.SWITCHES))


def error_types() -> str:
    """Which error ends with which exit code, in the order in which they are tried."""
    rows = ((f"`{place.partition(':')[2]}`", f"`{place.partition(':')[0]}`", code) for place, code in exits.TABLE)
    return table(("error", "defined in", "exit code"), rows)


def families() -> str:
    """The model types whose layers are known."""
    rows = ((f"`{name}`", *_family(family)) for name, family in sorted(FAMILIES.items()))
    return table(("`model_type`", "decoder layers", "head", "experts in a file", "formats"), rows)


def _family(family: Family) -> tuple[str, ...]:
    """The cells of a family's row but for its name."""
    experts, formats = "", "packed, dense"
    if family.matrix_class != "Linear":
        formats = "dense only"
    if family.experts is not None and family.experts.parts:
        part, tensor = family.experts.sources(family.experts.fused[0], 0)[0], family.experts.fused[0]
        experts = f"`{part.replace('.0.', '.*.')}`, or `{tensor}`"
    elif family.experts is not None:
        experts, formats = f"`{family.experts.fused[0]}`", "packed but for experts, dense"
    return f"`{family.layers}`", f"`{family.head}`", experts, formats


def results() -> str:
    """The pages of measured figures, by their titles."""
    found = [(page, page.read_text(encoding="utf-8")) for page in sorted((DOCS / "results").glob("*.md"))]
    lines = [f"- [{text.lstrip('# ').splitlines()[0]}](results/{page.name})" for page, text in found if text]
    return "\n".join(lines) or "None is recorded."


def blocks() -> dict[str, Callable[[], str]]:
    """Every block by the name that pages use."""
    found: dict[str, Callable[[], str]] = {
        "passes": passes,
        "run options": run_options,
        "commands": command_pages,
        "switches": switches,
        "error types": error_types,
        "families": families,
        "results": results,
    }
    for name, spec in SPECS.items():
        found[f"facts {name}"] = lambda spec=spec: facts(spec)
        found[f"options {name}"] = lambda spec=spec: options(spec)
    return found


def render(text: str) -> str:
    """A page with its blocks as they should be. Raises KeyError for a block that does not exist."""
    known = blocks()
    return _BLOCK.sub(lambda found: f"{found[1]}{known[found['name']]()}\n{found[3]}", text)


def pages() -> list[Path]:
    """Every page of the site."""
    return sorted(DOCS.rglob("*.md"))


def stale() -> list[Path]:
    """Pages whose generated parts are out of date."""
    return [page for page in pages() if render(text := page.read_text(encoding="utf-8")) != text]


def main(words: list[str]) -> int:
    """Refresh the pages, or with `--check` only name those that are out of date."""
    for page in (found := stale()):
        sys.stdout.write(f"{page.relative_to(DOCS.parent)}\n")
        if "--check" not in words:
            page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if found and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
