"""Values for the model inputs a mask is made from, at the example's sizes and at others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.ops import has_tensor, hint, key, op_of, val

_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_LONGEST = 4096


def trials(
    inputs: list[Node], values: Mapping[Node, Any], steps: Sequence[Node]
) -> Iterator[dict[Node, Any]]:
    """Assignments of all placeholders: the example, then patterns in `inputs`.

    Patterns: all 1, all 0, right padding, left padding and random 0/1, and the same with the
    integers that the mask's own nodes compare with (a padding token's id).
    """
    yield dict(values)
    if not inputs:
        return
    generator = torch.Generator().manual_seed(0)  # torch.seed() would change the user's
    pairs: list[tuple[float, float]] = [(1, 0)]
    pairs += [(c + 1, c) for c in sorted(_compared(steps)) if c not in (0, 1)]
    for seen, hidden in pairs:
        for pattern in (_full, _empty, _right, _left, _left, _random):
            given = dict(values)
            for node in inputs:
                if has_tensor(node):
                    keep = pattern(values[node].shape, generator)
                    filled = torch.where(keep, seen, hidden)
                    given[node] = filled.to(values[node].dtype)
            yield given


def _compared(steps: Sequence[Node]) -> set[int]:
    found = set()
    for node in steps:
        if op_of(node) in _COMPARES and len(node.args) > 1:
            other = node.args[1]
            if isinstance(other, int | float) and float(other).is_integer():
                found.add(int(other))
    return found


def _lengths(shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    last = shape[-1] if shape else 1
    lengths = torch.randint(1, last + 1, (*shape[:-1], 1), generator=generator)
    return lengths, torch.arange(last).expand(shape)


def _full(shape: torch.Size, _: torch.Generator) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _empty(shape: torch.Size, _: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def _right(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    lengths, at = _lengths(shape, generator)
    return at < lengths


def _left(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    lengths, at = _lengths(shape, generator)
    return at >= (shape[-1] if shape else 1) - lengths


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < 0.6


@dataclass(frozen=True)
class Resize:
    """Other values for the symbols of a dynamic graph."""

    symbols: Mapping[Any, int]

    def size(self, size: Any) -> int:
        """`size` (int or SymInt) under the other values."""
        if isinstance(size, torch.SymInt):
            return int(size.node.expr.subs(self.symbols))
        return int(size)

    def value(self, node: Node, example: Any) -> Any:
        """A value for placeholder `node` of the other size: ones, or normal numbers."""
        if not has_tensor(node):
            return example
        shape = [self.size(s) for s in val(node).shape]
        if shape == list(example.shape):
            return example
        if example.is_floating_point():
            return torch.randn(shape, dtype=example.dtype)
        return torch.ones(shape, dtype=example.dtype)


def other_size(examples: Mapping[Node, Any], steps: Sequence[Node]) -> Resize | None:
    """Larger sizes for a dynamic graph (past the integers the mask's nodes use); None if fixed."""
    symbols: dict[Any, int] = {}
    beyond = max((abs(i) for i in _integers(steps) if abs(i) <= _LONGEST), default=0)
    for node in examples:
        if has_tensor(node):
            for size in val(node).shape:
                if not isinstance(key(size), int):
                    symbols.update(_grown(size, beyond, batch=size is val(node).shape[0]))
    return Resize(symbols) if symbols else None


def _grown(size: Any, beyond: int, *, batch: bool) -> dict[Any, int]:
    environment = size.node.shape_env
    found = {}
    for symbol in size.node.expr.free_symbols:
        wanted = hint(size) + (1 if batch else max(5, beyond + 3))
        bounds = environment.var_to_range.get(symbol)
        upper = wanted if bounds is None or not bounds.upper.is_number else bounds.upper
        found[symbol] = min(wanted, int(upper)) if upper < 1 << 30 else wanted
    return found


def _integers(steps: Sequence[Node]) -> set[int]:
    return {a for n in steps for a in n.args if isinstance(a, int) and not isinstance(a, bool)}
