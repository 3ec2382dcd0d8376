"""Energy bars of a report: operation counts priced with a published table.

An estimate of arithmetic alone: what is not in the table is counted and named, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from passes.opcount import OpCount

SOURCE = "M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"
# Picojoules per operation.
TABLE: Mapping[tuple[str, str], float] = {
    ("mul", "float32"): 3.7,
    ("add", "float32"): 0.9,
    ("mul", "float16"): 1.1,
    ("add", "float16"): 0.4,
    ("mul", "int32"): 3.1,
    ("add", "int32"): 0.1,
    ("mul", "int8"): 0.2,
    ("add", "int8"): 0.03,
}


@dataclass(frozen=True)
class Energy:
    """Nanojoules by "operation dtype", and how many operations have no price."""

    nanojoules: Mapping[str, float]
    unpriced: int

    @property
    def total(self) -> float:
        """Nanojoules of all priced operations."""
        return sum(self.nanojoules.values())


def energy(count: OpCount) -> Energy:
    """Price `count` with `TABLE`."""
    priced: dict[str, float] = {}
    unpriced = 0
    for op, dtype, n in count:
        price = TABLE.get((op, dtype))
        if price is None:
            unpriced += n
        else:
            priced[f"{op} {dtype}"] = n * price / 1000
    return Energy(priced, unpriced)
