"""One run of `compress` in a process of its own, timed as a peer is.

`python -m tests.bench.peer_rewright MODEL OUT OPTIONS` with the options of the pass as JSON; prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from rewright.passes.context import Silent
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.bench.peer_llmcompressor import timed, warm


def main(model: str, out: str, options: str) -> None:
    stage = make(1, "compress", json.loads(options))
    run = Run(Path(model), Path(out), (stage,), RunOptions(seed=0, threads=1))
    # imported when it is called for otherwise
    import_module(stage.spec.impl.partition(":")[0])
    warm(model)
    packages = ("rewright", "torch", "transformers", "compressed-tensors")
    print(json.dumps(timed(lambda: execute(run, Silent()), packages)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
