"""Which integer inputs are indices into tables, and so which values they may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Node

# Ops that hand the values on unchanged (or a part of them).
_PASSING = frozenset(
    (
        "view", "reshape", "slice", "expand", "unsqueeze", "squeeze", "select", "_to_copy", "to",
        "clone", "alias", "permute", "transpose", "contiguous", "flatten", "detach", "repeat",
        "split", "split_with_sizes", "chunk", "getitem", "cat", "flip", "lift_fresh_copy",
    )
)  # fmt: skip


def index_range(node: Node) -> tuple[int | None, int | None]:
    """(smallest, largest) value `node` may hold for every table it indexes; (None, None) if none.

    Followed through ops that only move values; arithmetic on an index ends the search.
    """
    sizes = list(_tables(node, set()))
    return (0, min(sizes) - 1) if sizes else (None, None)


def _tables(node: Node, seen: set[Any]) -> Iterator[int]:
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        name = getattr(user.target, "__name__", "").split(".")[0]
        args: tuple[Any, ...] = user.args
        if name == "embedding" and args[1] is node:
            yield int(args[0].meta["val"].shape[0])
        elif name == "index_select" and args[2] is node:
            yield int(args[0].meta["val"].shape[args[1]])
        elif name in _PASSING:
            yield from _tables(user, seen)
