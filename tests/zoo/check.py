"""Running one entry of the zoo: trace, canonicalise, find; and comparing with what it must be."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import torch

from passes.canonicalise import canonicalise
from passes.find import Found, find
from passes.site import AttentionSite
from passes.trace import trace
from passes.traced import Traced
from tests.zoo import later, plain_torch, text, vision
from tests.zoo.entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *text.ENTRIES,
    *vision.ENTRIES,
    *plain_torch.ENTRIES,
    *later.ENTRIES,
)


def spread(model: torch.nn.Module) -> None:
    """Make every weight count: transformers' initial weights are nearly zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p + 0.2 * torch.randn_like(p))


def run(entry: Entry, attn: str, *, dynamic: bool = False) -> tuple[Any, Any, Traced, Found]:
    """(model, inputs, canonical trace, found)."""
    model, inputs = entry.make(attn)
    spread(model)
    traced = canonicalise(trace(model, inputs, dynamic_shapes=entry.dynamic if dynamic else None))
    return model, inputs, traced, find(traced)


def as_expected(found: AttentionSite, sizes: dict[str, int]) -> dict[str, Any]:
    """The facts of a found site that an expectation names; dynamic sizes by value."""
    dims = tuple(_value(d, sizes) for d in asdict(found.dims).values())
    return {
        "id": found.id, "mask": found.mask.kind, "dims": dims, "cross": found.cross,
        "dropout": found.dropout, "window": found.mask.window,
    }  # fmt: skip


def expected(entry: Entry) -> list[dict[str, Any]]:
    """What `as_expected` must give for every site, in order."""
    names = ("id", "mask", "dims", "cross", "dropout", "window")
    return [{n: getattr(s, n) for n in names} for s in entry.sites]


def sizes_of(traced: Traced) -> dict[str, int]:
    """Dynamic names by their value in the example inputs."""
    return {
        name: traced.example_kwargs[inp].shape[axis]
        for inp, axes in traced.dynamic.items()
        for axis, name in axes.items()
    }


def _value(size: int | str, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    text_ = re.sub(r"[A-Za-z_]\w*", lambda m: str(sizes[m.group()]), size)
    assert re.fullmatch(r"[\d\s*+/()-]+", text_), size
    return int(eval(text_))


def resized(entry: Entry, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fresh inputs of the entry's other sizes."""
    made = {}
    for name, value in inputs.items():
        shape = list(value.shape)
        for axis, dim in (entry.dynamic or {}).get(name, {}).items():
            shape[axis] = entry.resize[dim]
        if value.is_floating_point():
            made[name] = torch.randn(shape)
        elif name.endswith("attention_mask"):
            made[name] = torch.ones(shape, dtype=value.dtype)
            made[name][-1, -2:] = 0
        elif value.dtype == torch.bool:
            made[name] = torch.zeros(shape, dtype=torch.bool)
            made[name][-1, -2:] = True
        else:
            made[name] = torch.randint(3, text.V, shape)
    return made
