"""`flexgen-policy-search` at work: search, attach the policy, draw what it does."""

from __future__ import annotations

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.files import remove_tree
from rewright.formats.policy import FILE, FOLDER
from rewright.passes.context import Context
from rewright.passes.flexgen_policy_search import policy, report
from rewright.passes.flexgen_policy_search.spec import FlexgenOptions, metrics
from rewright.passes.spec import Layout, Metrics
from rewright.passes.writing import carry


def run(context: Context, options: FlexgenOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Attach the best policy; the weights are linked as they are."""
    found = policy.document(options, Layout.of(source), context.inputs)
    hardware = found["hardware"]
    if hardware["source"] == "detected":
        sizes = ", ".join(f"{tier} {part['bytes'] / 1e9:.3g} GB" for tier, part in hardware["tiers"].items())
        context.reporter.warn(f"the machine is what was found here, and not measured: {hardware['name']}; {sizes}")
    draft.link_weights(source)
    carry(context, source, draft)
    # a policy that the source has
    remove_tree(draft.path / FOLDER)
    draft.put(f"{FOLDER}/{FILE}", policy.encode(found))
    report.put(draft, found, metrics(found))
    return metrics(found)
