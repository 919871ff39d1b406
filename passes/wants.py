"""What a pass says it wants, held against a source at the sight of its headers."""

from __future__ import annotations

from pathlib import Path

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.calibration import TOKENIZER_FILES, has_tokenizer
from rewright.passes.errors import InputError, UsageError
from rewright.passes.inputs import paths_of
from rewright.passes.models.families import known_types
from rewright.passes.recipe import Stage
from rewright.passes.spec import Layout, fields_of


def refuse(stage: Stage, source: Checkpoint, layout: Layout) -> None:
    """Hold a stage's `wants` against the source of the run, and its `archs` against the layout that the stage is given.

    Raises InputError for what the source lacks or the pass does not take, UsageError for a text that no option names.
    """
    spec, wants = stage.spec, stage.spec.needs(stage.options)
    if "config" in wants and source.config is None:
        raise InputError(
            f"`{source.path}` has no `config.json`", hint=f"`{spec.name}` needs the whole checkpoint directory"
        )
    if "weights" in wants and not layout.tensors:
        raise InputError(f"`{source.path}` holds no tensor, and `{spec.name}` is about tensors")
    model_type = layout.config.get("model_type")
    if spec.archs and (not isinstance(model_type, str) or model_type not in spec.archs):
        raise InputError(
            f"model type `{model_type}` is not one that `{spec.name}` takes",
            hint=known_types(layout.config, spec.archs),
        )
    if "tokenizer" in wants and not has_tokenizer(source):
        looked = ", ".join(f"`{name}`" for name in TOKENIZER_FILES)
        raise InputError(
            f"`{source.path}` has no tokenizer, and `{spec.name}` needs one: there is none of {looked}",
            hint="put the model's tokenizer files beside its weights",
        )
    if "text" in wants and not paths_of(stage.options):
        flags = " or ".join(f"`--{item.flag}`" for item in fields_of(type(stage.options)) if item.type is Path)
        raise UsageError(f"`{spec.name}` needs a text, and none is named", hint=f"name one with {flags}")
