"""OpCount: how many operations of each kind and dtype, and how many bytes moved.

Counts are closed forms written by the forms and compared with the lowered TensorIR by a test,
so they are checked claims. The vocabulary of operations is `OPS`; a subtraction counts as an
`add`, a comparison, minimum or maximum as a `max`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

OPS = (
    "mul", "add", "div", "exp", "max", "select", "sqrt", "tanh", "erf", "log",
    "sin", "cos", "abs", "round", "shift", "xor", "popcount",
)  # fmt: skip


@dataclass(frozen=True)
class OpCount:
    """Operations by (operation, dtype) and bytes read and written from or to tensors."""

    ops: Mapping[tuple[str, str], int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0

    def __post_init__(self) -> None:
        for op, _ in self.ops:
            if op not in OPS:
                raise ValueError(f"unknown operation {op!r}; the vocabulary is {OPS}")

    @classmethod
    def of(cls, dtype: str = "float32", *, read: int = 0, written: int = 0, **ops: int) -> OpCount:
        """Count with one dtype: ``OpCount.of(mul=8, add=8, read=64, written=32)``."""
        return cls({(op, dtype): n for op, n in ops.items() if n}, read, written)

    def __add__(self, other: OpCount) -> OpCount:
        ops = dict(self.ops)
        for key, n in other.ops.items():
            ops[key] = ops.get(key, 0) + n
        return OpCount(
            ops, self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        )

    def __mul__(self, times: int) -> OpCount:
        ops = {key: n * times for key, n in self.ops.items()}
        return OpCount(ops, self.bytes_read * times, self.bytes_written * times)

    def total(self, op: str | None = None) -> int:
        """Sum over dtypes of one operation, or of all."""
        return sum(n for (name, _), n in self.ops.items() if op is None or name == op)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        for (op, dtype), n in sorted(self.ops.items()):
            yield op, dtype, n

    def to_json(self) -> dict[str, object]:
        """Plain data: {"ops": {"mul:float32": n}, "bytes_read": n, "bytes_written": n}."""
        return {
            "ops": {f"{op}:{dtype}": n for op, dtype, n in self},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> OpCount:
        """Inverse of `to_json`."""
        raw = data["ops"]
        assert isinstance(raw, Mapping)
        ops = {(key.split(":")[0], key.split(":")[1]): int(n) for key, n in raw.items()}
        return cls(ops, int(str(data["bytes_read"])), int(str(data["bytes_written"])))
