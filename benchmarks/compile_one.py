"""Compile one artifact in a process of its own: ``python -m benchmarks.compile_one ORDER``.

ORDER is JSON; the last line of stdout is the report with the work of all kernels ("flops").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    order: dict[str, Any] = json.loads(sys.argv[1])
    from passes.errors import RewriterError
    from rewriter.api import compile as compile_artifact
    from rewriter.models import load_model

    try:
        loaded = load_model(order["model"], **order["load"])
        artifact = compile_artifact(
            loaded.model,
            loaded.example_inputs,
            path=Path(order["path"]),
            threads=order["threads"],
            name=loaded.name,
            **order["options"],
        )
    except RewriterError as error:
        print(" ".join(str(error).split())[:400], file=sys.stderr)
        return 1
    from benchmarks.run import work

    report = dict(artifact.report)
    said = {key: report.get(key) for key in ("compiled", "artifact", "fidelity")}
    print(json.dumps({**said, "flops": work(report.get("kernels", ()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
