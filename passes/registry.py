"""The list of passes. Everything that enumerates passes reads it here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rewright.passes.cast.spec import CAST
from rewright.passes.compress.spec import COMPRESS
from rewright.passes.convert.spec import CONVERT
from rewright.passes.dejavu_predictor_train.spec import DEJAVU
from rewright.passes.errors import UsageError
from rewright.passes.flexgen_policy_search.spec import FLEXGEN
from rewright.passes.hyena_distill.spec import HYENA_DISTILL
from rewright.passes.prompt.spec import PROMPT
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Spec, fields_of


def _checked(specs: Iterable[Spec]) -> dict[str, Spec]:
    """Refuse a spec whose option would mean two things beside the run's own options."""
    taken = {item.flag for item in fields_of(RunOptions)}
    known: dict[str, Spec] = {}
    for spec in specs:
        clash = taken & {item.flag for item in fields_of(spec.options)}
        if clash or spec.name in known:
            raise ValueError(f"pass {spec.name}: {', '.join(clash) or 'its name'} is taken")
        known[spec.name] = spec
    return known


SPECS: dict[str, Spec] = _checked([COMPRESS, PROMPT, HYENA_DISTILL, DEJAVU, FLEXGEN, CONVERT, CAST])


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The known word that `word` probably meant."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)), None)


def get(name: str) -> Spec:
    """A pass by name. Raises UsageError with the nearest name."""
    if name in SPECS:
        return SPECS[name]
    close = nearest(name, SPECS)
    hint = f"did you mean `{close}`?" if close else f"passes: {', '.join(SPECS)}"
    raise UsageError(f"no pass `{name}`", hint=hint)
