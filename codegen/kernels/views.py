"""Views: a tensor [B, H, T, X] that lies somewhere in a parameter with other axes.

Projections write tokens first, [B, T, H * X], often q, k and v side by side. A kernel that reads
through a view needs no transposed copy. A PrimFunc keeps its views in its facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VIEWS = "views"  # key in the facts of a kernel
Axis = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class View:
    """Element (b, h, t, x) is at index c + b cb + h ch + t ct + x cx on each axis of a parameter.

    `argument` is the parameter's position, `shape` is (B, H, T, X) and `axes` holds
    (c, cb, ch, ct, cx) for each axis of the parameter.
    """

    argument: int
    shape: tuple[int, int, int, int]
    axes: tuple[Axis, ...]

    def index(self, *at: Any) -> list[Any]:
        """Where element (b, h, t, x) is."""
        return [_affine(axis, at) for axis in self.axes]

    def to_json(self) -> list[Any]:
        """Plain data."""
        return [self.argument, list(self.shape), [list(axis) for axis in self.axes]]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> View:
        """Inverse of `to_json`."""
        argument, (b, h, t, x), axes = data
        return cls(argument, (b, h, t, x), tuple((a, b, c, d, e) for a, b, c, d, e in axes))


def _affine(axis: Axis, at: tuple[Any, ...]) -> Any:
    total: Any = axis[0]
    for factor, i in zip(axis[1:], at, strict=True):
        if factor:
            term = i if factor == 1 else i * factor
            total = term if isinstance(total, int) and total == 0 else total + term
    return total


def plain(argument: int, shape: Sequence[int]) -> View:
    """A parameter that is [B, H, T, X] itself."""
    b, h, t, x = (int(n) for n in shape)
    one = [[0, *(int(i == n) for i in range(4))] for n in range(4)]
    return View(argument, (b, h, t, x), tuple((a, b, c, d, e) for a, b, c, d, e in one))


def tokens_first(argument: int, shape: Sequence[int]) -> View:
    """A parameter [B, T, H * X]."""
    b, h, t, x = (int(n) for n in shape)
    axes: tuple[Axis, ...] = ((0, 1, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, x, 0, 1))
    return View(argument, (b, h, t, x), axes)


class Viewed:
    """A tensor or buffer seen through a view: indexed by (b, h, t, x), by brackets or a call."""

    def __init__(self, source: Any, view: View) -> None:
        self.source, self.view = source, view
        self.shape, self.dtype = view.shape, str(source.dtype)

    def __call__(self, *at: Any) -> Any:
        """Element (b, h, t, x)."""
        return self.source[tuple(self.view.index(*at))]

    def __getitem__(self, at: tuple[Any, ...]) -> Any:
        return self(*at)


@dataclass(frozen=True)
class Layout:
    """How the parameters of a kernel hold its tensors.

    `inputs` are the views of the first tensors of a kernel (they may share parameters), which take
    the first `number` parameters; the rest are as they are. `tokens_first`: the output is
    [B, T, H * E].
    """

    inputs: tuple[View, ...]
    number: int
    tokens_first: bool = False

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(the viewed tensors, the other parameters)."""
        return [Viewed(args[v.argument], v) for v in self.inputs], list(args[self.number :])

    def output(self, buffer: Any, shape: Sequence[int]) -> Any:
        """The output buffer, indexed by (b, h, t, e)."""
        return Viewed(buffer, tokens_first(0, shape) if self.tokens_first else plain(0, shape))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        views = [v.to_json() for v in self.inputs]
        return {"inputs": views, "number": self.number, "tokens_first": self.tokens_first}


def take_layout(facts: dict[str, Any], tensors: int) -> Layout | None:
    """The layout in the facts of a kernel (removed from them); None: `tensors` plain ones."""
    data: Mapping[str, Any] | None = facts.pop(VIEWS, None)
    if data is None:
        return None
    inputs = tuple(View.from_json(v) for v in data["inputs"])
    assert len(inputs) == tensors
    return Layout(inputs, int(data["number"]), bool(data["tokens_first"]))
