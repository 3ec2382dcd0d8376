"""Results on disk: one JSON file a workload, written whole or not at all, so a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the result beside, then rename it into place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['workload']}.json"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)
    return path


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by workload; a file that is not one is left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            found[str(result["workload"])] = result
        except (ValueError, KeyError, TypeError):
            continue
    return found


def complete(result: Mapping[str, Any] | None, rows: tuple[str, ...]) -> bool:
    """Whether the stored result has every row asked for (even one that failed or was skipped)."""
    have = {row["engine"] for row in (result or {}).get("engines", ())}
    return bool(have) and have.issuperset(rows)
