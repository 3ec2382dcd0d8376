"""Forms that reach keys through landmarks: what they share (nystrom, soft)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from passes.errors import UsageError
from passes.form import Form, FormSpec, Params, Verdict
from passes.forms._landmarks import landmark_verdict
from passes.forms.exact import Exact
from passes.site import AttentionSite


def whole_number(name: str, value: object, most: int) -> None:
    """UsageError unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UsageError(f"{name}: a whole number from 1 to {most}, got {value!r}")


class LandmarkForm(Form):
    """Low rank through m landmarks; exact attention where there are no more tokens than those.

    A subclass has the option `landmarks` and gives `low_rank`.
    """

    family = "low-rank"
    normalised: ClassVar[bool] = False

    @property
    def options(self) -> Any:
        """The config by its own type."""
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Padding masks, cross attention and grouped heads; nothing causal, no bias or window."""
        return landmark_verdict(site, self.name)

    def dense(self, queries: int, keys: int) -> bool:
        """Whether exact attention does the work of so many tokens."""
        return bool(min(queries, keys) <= self.options.landmarks)

    @abstractmethod
    def low_rank(
        self,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention [B, H, T, E] through landmarks, however many tokens there are."""

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
        """Attention [B, H, T, E]."""
        if self.dense(q.shape[2], k.shape[2]):
            return Exact().attend(spec, {}, q, k, v, key_mask)
        return self.low_rank(spec, q, k, v, key_mask)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S] of any sign, by giving each key a value of its own."""
        if self.dense(q.shape[2], k.shape[2]):
            return Exact().weights(spec, {}, q, k, key_mask)
        each = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        return self.low_rank(spec, q, k, each.expand(*k.shape[:2], -1, -1), key_mask)
