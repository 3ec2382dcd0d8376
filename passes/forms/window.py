"""window: softmax over the nearest keys only (Hofstaetter et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.decode_form import CachedStreaming, StateSpec, Stepped, Tensors
from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._linear import group_verdict, sizes
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite


@dataclass(frozen=True)
class WindowConfig(FormConfig):
    """A query sees `left` keys before its own and `right` after it; -1 for `right`: as `left`."""

    left: int = 64
    right: int = -1

    def __post_init__(self) -> None:
        for name, least in (("left", 0), ("right", -1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name}: a whole number from {least}, got {value!r}")


class Window(CachedStreaming):
    """Softmax attention with all masks of the site and, on top of them, a sliding window.

    Exact wherever the model looks no further (a window of at least S - 1 is softmax), so it fits
    heads that attend to neighbours; a head that spreads over the whole text loses most. Keys
    outside are never read: time grows with the tokens times the window. A window of the site's
    own is narrowed, never widened. A query all of whose window is hidden gives 0.
    Token by token the keys of one window are held.
    """

    name = "window"
    family = "sparse"
    paper = Paper(
        "Hofstaetter, Zamani, Mitra, Craswell, Hanbury",
        "Local Self-Attention over Long Text for Efficient Document Retrieval",
        2020,
        "https://arxiv.org/abs/2005.04908",
    )
    formula = (
        "softmax(scale * q k^T + mask) v,  mask hides key j of query i unless -l <= j - i <= r"
    )
    local = True
    Config = WindowConfig

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask; queries and keys must be tokens of one sequence."""
        aligned = site.mask.causal or site.mask.window is not None
        if site.cross or site.reduced or (site.dims.T != site.dims.S and not aligned):
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so none is near another",
            )
        return group_verdict(site)

    def _window(self, given: tuple[int, int] | None) -> tuple[int, int]:
        config = self.config
        assert isinstance(config, WindowConfig)
        left, right = config.left, config.left if config.right < 0 else config.right
        return (left, right) if given is None else (min(left, given[0]), min(right, given[1]))

    def _inner(self, spec: FormSpec) -> FormSpec:
        return FormSpec(Exact.name, spec.causal, spec.scale, self._window(spec.window))

    def _narrowed(self, site: AttentionSite) -> AttentionSite:
        mask = replace(site.mask, window=self._window(site.mask.window))
        return replace(site, mask=mask)

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax attention inside the window [B, H, T, E]."""
        return Exact().attend(self._inner(spec), {}, q, k, v, key_mask, bias)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax weights [B, H, T, S], 0 outside the window."""
        return Exact().weights(self._inner(spec), {}, q, k, key_mask, bias)

    def ops(self, site: AttentionSite) -> OpCount:
        """As exact attention with a window (the definition counts pairs that are then hidden)."""
        return Exact().ops(self._narrowed(site))

    def counted(self, site: AttentionSite) -> OpCount:
        """Only pairs inside the window: mul and add pairs*(D + E), scale mul pairs."""
        b, h, _, t, s, d, e = sizes(site)
        left, right = self._window(site.mask.window)
        right = 0 if site.mask.causal else right
        at = range(s - t, s)
        pairs = b * h * sum(max(min(i + right, s - 1) - max(i - left, 0) + 1, 0) for i in at)
        return OpCount.of(mul=pairs * (d + e + 1), add=pairs * (d + e))

    def kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
    ) -> Any:
        """One fused kernel that skips keys outside the window."""
        return Exact().kernel(kit, self._inner(spec), {}, q, k, v, key_mask, bias)

    def bounded(self, site: AttentionSite) -> bool:
        """What has left the window is forgotten."""
        return False

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """Keys and values of a window, whatever the length."""
        return super().state(self._narrowed(site), length)

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
        """Exact attention's step with this window."""
        return Exact().step(self._inner(spec), {}, q, k, v, state, position)

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
        """One kernel that turns a ring and reads it."""
        return Exact().step_kernel(kit, self._inner(spec), {}, q, k, v, state, position)
