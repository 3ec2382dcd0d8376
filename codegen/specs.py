"""TensorSpec: one input or output of compiled code. numpy only; used where tvm is absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and dtype (numpy's word) of a tensor.

    `low` and `high` are the smallest and largest value allowed (both inclusive) where the tensor
    holds indices, e.g. token ids; None where every value is fine.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: int | None = None
    high: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Inverse of `to_json`; TypeError on an unknown or missing field."""
        return cls(**{**data, "shape": tuple(int(n) for n in data["shape"])})
