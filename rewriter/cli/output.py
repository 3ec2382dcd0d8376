"""Where the command line writes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True)


def print_json(data: Any) -> None:
    """`data` as JSON on stdout; NaN and infinities become null, as JSON has none."""
    sys.stdout.write(json.dumps(finite(data), indent=2, default=str) + "\n")


def finite(data: Any) -> Any:
    """`data` with numbers that are not finite as None."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(k): finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [finite(v) for v in data]
    return data
