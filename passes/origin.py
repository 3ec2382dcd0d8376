"""Where a node comes from: module path, file and line, sizes by name."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch.fx import Node

from passes.ops import key
from passes.site import Dim, Dims
from passes.traced import Traced

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = f"{os.sep}torch{os.sep}"


def module_path(node: Node) -> str:
    """The innermost module's path, as the model names it ("" for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    last = list(stack.values())[-1]
    path = str(last[0] if isinstance(last, tuple) else last)
    path = re.sub(r"^L\[['\"]self['\"]\]\.?", "", path)
    path = re.sub(r"^L__self__[._]?", "", path)
    return re.sub(r"@\d+", "", path)


def source_line(node: Node) -> str:
    """ "file.py:line" of the innermost line that is not torch's own; "" if not recorded."""
    frames = _FRAME.findall(str(node.meta.get("stack_trace") or ""))
    own = [f for f in frames if _TORCH not in f[0]] or frames
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def symbol_names(traced: Traced) -> dict[str, str]:
    """Symbol of a dynamic size -> the user's name of that dimension."""
    names: dict[str, str] = {}
    for node in traced.module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for axis, name in traced.dynamic.get(node.name, {}).items():
            if isinstance(value, torch.Tensor) and axis < value.ndim:
                names[str(key(value.shape[axis]))] = name
    return names


def dims_of(q: Any, k: Any, v: Any, names: dict[str, str]) -> Dims:
    """Dims of one attention from (fake) tensors q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]."""

    def dim(size: Any) -> Dim:
        found = key(size)
        if isinstance(found, int):
            return found
        return re.sub(r"\b[su]\d+\b", lambda m: names.get(m.group(), m.group()), found)

    return Dims(
        B=dim(q.shape[0]),
        H=int(q.shape[1]),
        G=int(k.shape[1]),
        T=dim(q.shape[2]),
        S=dim(k.shape[2]),
        D=int(q.shape[3]),
        E=int(v.shape[3]),
    )
