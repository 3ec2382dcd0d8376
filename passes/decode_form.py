"""Streaming: forms that attend token by token, with a state in place of all earlier keys.

A step takes q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] of T new tokens (1 when generating, a
chunk of the prompt before that) at positions p .. p + T - 1, where p is `position[0, 0]` of
`position` [B, T] int64. Query i sees the tokens before p, through the state, and the new tokens
j <= i. It gives the output [B, H, T, E] and the new state. All sequences of a batch are at the
same position. Letters as in passes/site.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch

from passes.errors import InputError
from passes.form import YES, Form, FormSpec, Params, Reason, Verdict, no
from passes.forms._linear import accumulate_dtype, dtype_name
from passes.site import AttentionSite

BLOCK = 64  # keys are kept in blocks of so many, channel by channel: a block is read in a row
Tensors: TypeAlias = Sequence[torch.Tensor]
Stepped: TypeAlias = tuple[torch.Tensor, list[torch.Tensor]]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a state; all zero before the first token. `dtype` as torch spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def zeros(self) -> torch.Tensor:
        """The state before the first token."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype))


class Streaming(Form):
    """A form with a recurrent (or cached) way to compute the same causal attention."""

    def bounded(self, site: AttentionSite) -> bool:
        """Whether a sequence may not be longer than the state was made for."""
        return False

    def streams(self, site: AttentionSite) -> Verdict:
        """Whether it can go token by token at `site`: causal self attention, no other mask."""
        mask = site.mask
        if site.cross:
            return no(Reason.CROSS, f"{site.id} attends to another sequence than its own")
        if mask.window is not None:
            return no(Reason.MASK_WINDOW, f"{site.id} sees a window of keys {mask.window}")
        for wrong, reason in (
            (mask.unknown, Reason.MASK_UNKNOWN),
            (mask.bias, Reason.MASK_BIAS),
            (mask.padding, Reason.MASK_PADDING),
        ):
            if wrong:
                return no(reason, f"the mask of {site.id} is {mask.kind}, not just causal")
        if not mask.causal:
            return no(Reason.MASK_CAUSAL, f"{site.id} is not causal: a token sees later ones")
        return YES

    @abstractmethod
    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """The tensors kept between steps for sequences of up to `length` tokens."""

    @abstractmethod
    def step(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: Tensors,
        position: torch.Tensor,
    ) -> Stepped:
        """(output, new state) in torch; `state` is not changed."""

    @abstractmethod
    def step_kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        state: Sequence[Any],
        position: Any,
    ) -> tuple[Any, list[Any]]:
        """`step` through `kit`; the state's tensors are changed in place and handed back."""


class LinearStreaming(Streaming):
    """phi(q) S / max(phi(q) z, eps) with S = sum phi(k)^T v [B, G, R, E], z = sum phi(k) [B, G, R].

    The state's size does not grow with the tokens. A feature map must look at one token alone, and
    may look at its position (`features_at`, `map_kernels_at`).
    """

    eps: ClassVar[float] = 1e-12

    @abstractmethod
    def features(
        self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, H, T, R] of q and [B, G, S, R] of k, in the type sums are kept in."""

    @abstractmethod
    def width(self, site: AttentionSite) -> int:
        """R, the number of features."""

    @abstractmethod
    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """`features` through the kit."""

    def features_at(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` of new tokens at `position` [B, T]."""
        return self.features(spec, params, q, k)

    def map_kernels_at(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any, position: Any
    ) -> tuple[Any, Any]:
        """`features_at` through the kit."""
        return self.map_kernels(kit, spec, params, q, k)

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """S and z, whatever the length."""
        d, r = site.dims, self.width(site)
        kind = "float64" if dtype_name(site.dtype) == "float64" else "float32"
        batch = int(d.B)
        return (
            StateSpec("sum", (batch, d.G, r, d.E), kind),
            StateSpec("norm", (batch, d.G, r), kind),
        )

    def step(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: Tensors,
        position: torch.Tensor,
    ) -> Stepped:
        """New tokens meet each other by masked scores and older ones by the state."""
        fq, fk = self.features_at(spec, params, q, k, position)
        sums, norm = state
        values = v.to(accumulate_dtype(v.dtype))
        batch, heads, tokens, width = fq.shape
        fq = fq.reshape(batch, fk.shape[1], -1, tokens, width)  # [B, G, H/G, T, R]
        scores = (fq @ fk.transpose(-1, -2)[:, :, None]).tril()
        top = scores @ values[:, :, None] + fq @ sums[:, :, None]
        bottom = scores.sum(-1) + (fq @ norm[:, :, None, :, None]).squeeze(-1)
        out = top / bottom.clamp_min(self.eps)[..., None]
        new = [sums + fk.transpose(-1, -2) @ values, norm + fk.sum(-2)]
        return out.reshape(batch, heads, tokens, -1).to(v.dtype), new

    def step_kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        state: Sequence[Any],
        position: Any,
    ) -> tuple[Any, list[Any]]:
        """Feature maps, then one kernel that adds to the state and reads it; all in float32."""
        dtype = kit.dtype(v)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        fq, fk = self.map_kernels_at(kit, spec, params, q, k, position)
        out, *new = kit.linear_step(fq, fk, v, *state, eps=self.eps)
        return kit.cast(out, dtype), new


class CachedStreaming(Streaming):
    """Softmax over keys and values that are kept: all so far, or those of a causal window.

    Keys are held as [B, G, blocks, D, BLOCK], values as [B, G, blocks * BLOCK, E]. Without a window
    token j stands at place j, there is room for a stated length, and what lies behind the position
    is never read. With one the places are a ring, token j at place j modulo their number, and
    nothing limits the length.
    """

    def bounded(self, site: AttentionSite) -> bool:
        """Unless a window says which keys can be forgotten."""
        return site.mask.window is None

    def streams(self, site: AttentionSite) -> Verdict:
        """As other forms, and with a window that holds a query's own key."""
        window = site.mask.window
        if window is None or min(window) < 0:
            return super().streams(site)
        return super().streams(replace(site, mask=replace(site.mask, window=None)))

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """Room for `length` keys and values, or a window's, rounded up to whole blocks."""
        d, window = site.dims, site.mask.window
        blocks = -(-(length if window is None else window[0] + 1) // BLOCK)
        kind, batch = dtype_name(site.dtype), int(d.B)
        return (
            StateSpec("keys", (batch, d.G, blocks, d.D, BLOCK), kind),
            StateSpec("values", (batch, d.G, blocks * BLOCK, d.E), kind),
        )

    def step(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: Tensors,
        position: torch.Tensor,
    ) -> Stepped:
        """Attends over the keys that are held and the new ones, which then take their places."""
        keys, values = (x.clone() for x in state)
        first, room = int(position[0, 0]), values.shape[2]
        end = first + k.shape[2]
        if spec.window is None and end > room:
            raise InputError(f"position: {end} tokens do not fit a buffer for {room}")
        least = 0 if spec.window is None else max(0, first - spec.window[0])
        at = torch.arange(least, first) % room
        before = keys[:, :, at // BLOCK, :, at % BLOCK].permute(1, 2, 0, 3)
        seen = torch.cat([before, k], 2), torch.cat([values[:, :, at], v], 2)
        out = self.attend(spec, params, q, *seen)
        at = torch.arange(first, end)[-room:] % room
        keys[:, :, at // BLOCK, :, at % BLOCK] = k[:, :, -room:].permute(2, 0, 1, 3)
        values[:, :, at] = v[:, :, -room:]
        return out, [keys, values]

    def step_kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        state: Sequence[Any],
        position: Any,
    ) -> tuple[Any, list[Any]]:
        """One kernel whose work follows the position."""
        left = None if spec.window is None else spec.window[0]
        out, *new = kit.attention_step(q, k, v, *state, position, scale=spec.scale, left=left)
        return out, new
