"""Bytes a compiled model holds while it runs: its weights and the buffers planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations` are the planned buffers at their peak, outputs included.

    Inputs (the caller's) and the scratch space inside kernels (a tile per thread) are not in it.
    """

    activations: int
    weights: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.activations + self.weights

    def to_json(self) -> dict[str, int]:
        """{"activations_bytes", "weights_bytes", "peak_bytes"}."""
        return {f"{k}_bytes": v for k, v in (*asdict(self).items(), ("peak", self.peak))}

    @classmethod
    def from_json(cls, data: Mapping[str, int] | None) -> Memory | None:
        """Inverse of `to_json`; None for None."""
        return None if data is None else cls(data["activations_bytes"], data["weights_bytes"])


def planned(mod: Any, weights: Mapping[str, Any]) -> Memory | None:
    """The memory of a module with planned storage; None where sizes are not known (dynamic).

    A storage is held from its allocation to the end of the last tensor in it.
    """
    t = relax.transform
    lowered = tvm.transform.Sequential([t.LowerAllocTensor(), t.KillAfterLastUse()])(mod)
    bindings = [b for block in lowered["main"].body.blocks for b in block.bindings]
    ends = _ends(bindings)
    held = top = 0
    free_at: dict[int, int] = {}
    for at, binding in enumerate(bindings):
        if _op(binding) == "relax.memory.alloc_storage":
            size = _size(binding.value)
            if size is None:
                return None
            held += size
            top = max(top, held)
            end = ends.get(binding.var, len(bindings))
            free_at[end] = free_at.get(end, 0) + size
        held -= free_at.pop(at, 0)
    return Memory(top, sum(int(np.asarray(w).nbytes) for w in weights.values()))


def _op(binding: Any) -> str:
    return str(getattr(getattr(binding.value, "op", None), "name", ""))


def _size(call: Any) -> int | None:
    try:
        return int(np.prod([int(d) for d in call.args[0].values], dtype=np.int64))
    except TypeError:
        return None


def _ends(bindings: list[Any]) -> dict[Any, int]:
    """Of each storage, the number of the binding that ends its last tensor or itself."""
    storage_of: dict[Any, Any] = {}
    ends: dict[Any, int] = {}
    for at, binding in enumerate(bindings):
        name = _op(binding)
        if name == "relax.memory.alloc_tensor":
            storage_of[binding.var] = binding.value.args[0]
        elif name in ("relax.memory.kill_tensor", "relax.memory.kill_storage"):
            killed = binding.value.args[0]
            ends[storage_of.get(killed, killed)] = at
    return ends
