"""Capture: what goes into and comes out of the attentions of a model, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.errors import FitError
from passes.substitute import AttentionModule, Rewritten


@dataclass(frozen=True)
class Call:
    """One call of an attention: q [B, H, T, D], k [B, G, S, D], v [B, G, S, E], its output
    [B, H, T, E], and key_mask [B or 1, S] or bias where the site has one."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    bias: Tensor | None
    out: Tensor

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = (self.q, self.k, self.v, self.key_mask, self.bias, self.out)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def rows(self, start: int, stop: int) -> Call:
        """The same call for the samples start to stop."""
        return Call(
            self.q[start:stop],
            self.k[start:stop],
            self.v[start:stop],
            _rows(self.key_mask, len(self.q), start, stop),
            _rows(self.bias, len(self.q), start, stop),
            self.out[start:stop],
        )


def _rows(mask: Tensor | None, batch: int, start: int, stop: int) -> Tensor | None:
    """Samples of a tensor that may be shared by the whole batch."""
    return mask[start:stop] if mask is not None and mask.shape[0] == batch else mask


class _Enough(Exception):
    """Ends a forward pass once all wanted sites were seen."""


class _Recorder:
    """Hooks that keep the calls of some sites of one pass."""

    def __init__(self, modules: Mapping[str, AttentionModule]) -> None:
        self.modules = modules
        self.seen: dict[str, Call] = {}

    @contextmanager
    def listening(self) -> Any:
        """Hooks are there inside the block only."""
        handles = [
            module.register_forward_hook(self._hook(site), with_kwargs=True)
            for site, module in self.modules.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            names = ("q", "k", "v", "key_mask", "bias")
            given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
            kept: Any = {n: None if t is None else t.detach() for n, t in given.items()}
            self.seen[site] = Call(**kept, out=out.detach())
            if len(self.seen) == len(self.modules):
                raise _Enough

        return keep


@torch.no_grad()
def capture(
    rewritten: Rewritten,
    batches: Iterable[Mapping[str, Tensor]],
    sites: Sequence[str],
    max_bytes: int,
) -> dict[str, list[Call]]:
    """The calls of `sites` while the model runs on `batches`, at most `max_bytes` in all.

    The pass over a batch ends at the last wanted site. Calls are by batch: entry i of every site
    is from batch i. At least one batch is kept; one that alone is too big is cut to fewer samples.

    Raises:
        FitError: no batch, or values that are not finite (the message names the site).
    """
    recorder = _Recorder({s: rewritten.attention(s) for s in sites})
    kept: dict[str, list[Call]] = {s: [] for s in sites}
    held = 0
    with recorder.listening():
        for index, batch in enumerate(batches):
            seen = _one(rewritten, batch, recorder)
            size = sum(c.bytes for c in seen.values())
            if held + size > max_bytes:
                if held:
                    break
                seen = {s: _cut(c, max_bytes / max(size, 1)) for s, c in seen.items()}
            held += size
            for site in sites:
                _check(seen[site], site, index)
                kept[site].append(_compact(seen[site]))
    if not held:
        raise FitError("nothing was captured: no calibration batch was given")
    return kept


def _one(rewritten: Rewritten, batch: Mapping[str, Tensor], recorder: _Recorder) -> dict[str, Call]:
    recorder.seen = {}
    with suppress(_Enough):
        rewritten.module(**batch)
    missing = [s for s in recorder.modules if s not in recorder.seen]
    if missing:
        raise FitError(f"the model does not reach its attention {', '.join(missing)}")
    return recorder.seen


def _cut(call: Call, share: float) -> Call:
    return call.rows(0, max(1, int(len(call.q) * share)))


def _compact(call: Call) -> Call:
    """Own contiguous memory: a view would hold the whole layer's activations."""
    held = (call.q, call.k, call.v, call.key_mask, call.bias, call.out)
    return Call(*(None if t is None else t.contiguous().clone() for t in held))  # type: ignore[arg-type]


def _check(call: Call, site: str, index: int) -> None:
    for name in ("q", "k", "v", "out"):
        if not bool(torch.isfinite(getattr(call, name)).all()):
            raise FitError(
                f"calibration batch {index}: {name} of {site} has NaN or infinite values; "
                "check the model and the data"
            )
