"""Energy of counted operations, from published prices per operation; an estimate, not a measure.

Prices are for a 45 nm process at about 0.9 V, in picojoules. Arithmetic: M. Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014; the 32-bit shift as used
by H. You et al., "ShiftAddViT" (NeurIPS 2023). Memory is priced from the same talk's range for
an access of DRAM (1.3 to 2.6 nJ for 64 bits): the lower end. Operations without a published
price (exp, select, ...) are listed, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from passes.errors import UnknownName
from passes.opcount import OpCount


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules by (operation, dtype), and for each byte read from or written to memory."""

    name: str
    source: str
    picojoules: Mapping[tuple[str, str], float]
    per_byte: float


@dataclass(frozen=True)
class Energy:
    """Picojoules of arithmetic by "operation:dtype", of memory, and what has no price."""

    arithmetic: Mapping[str, float]
    memory: float
    unpriced: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Picojoules of arithmetic and memory."""
        return sum(self.arithmetic.values()) + self.memory

    def to_json(self) -> dict[str, object]:
        """Plain data, in picojoules."""
        return {
            "arithmetic_pj": dict(self.arithmetic),
            "memory_pj": self.memory,
            "total_pj": self.total,
            "unpriced": dict(self.unpriced),
        }


HOROWITZ_45NM = EnergyTable(
    "horowitz-45nm",
    "M. Horowitz, ISSCC 2014 (45 nm, 0.9 V); shifts: ShiftAddViT, NeurIPS 2023",
    {
        ("mul", "float32"): 3.7,
        ("add", "float32"): 0.9,
        ("mul", "float16"): 1.1,
        ("add", "float16"): 0.4,
        ("mul", "int32"): 3.1,
        ("add", "int32"): 0.1,
        ("mul", "int8"): 0.2,
        ("add", "int8"): 0.03,
        ("shift", "int32"): 0.13,
        ("shift", "int8"): 0.024,
    },
    1300.0 / 8,
)
_TABLES = {t.name: t for t in (HOROWITZ_45NM,)}


def table_named(name: str) -> EnergyTable:
    """The table called `name` (a target's `energy`); `UnknownName` if there is none."""
    if name not in _TABLES:
        raise UnknownName("energy table", name, _TABLES)
    return _TABLES[name]


def energy(count: OpCount, table: EnergyTable = HOROWITZ_45NM) -> Energy:
    """Price `count`: arithmetic by operation, and every byte as if it came from memory."""
    priced: dict[str, float] = {}
    unpriced: dict[str, int] = {}
    for op, dtype, n in count:
        price = table.picojoules.get((op, dtype))
        if price is None:
            unpriced[f"{op}:{dtype}"] = n
        else:
            priced[f"{op}:{dtype}"] = n * price
    memory = (count.bytes_read + count.bytes_written) * table.per_byte
    return Energy(priced, memory, unpriced)
