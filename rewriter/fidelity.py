"""How much a rewritten model resembles the original: numbers on the same inputs, no labels.

The outputs are compared as one vector a sample ("embedding"): the mean over the visible tokens for
token outputs [B, T, C], the output itself for [B, C], the flattened output otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from passes.errors import FitError

Metric = Callable[[Any, Mapping[str, Tensor]], Tensor]
MASKS = ("attention_mask", "key_padding_mask", "padding_mask", "mask")
FEWEST = 3  # with fewer samples a nearest neighbour says nothing


@dataclass(frozen=True)
class Fidelity:
    """Rewritten against original.

    `cosine_mean`, `cosine_min`: cosine of the two embeddings of a sample. `relative_error`: norm of
    the difference of all main outputs (padding left out) by the norm of the original's.
    `nn_agreement`: share of samples whose nearest other sample is the same in both; None for fewer
    than three samples.
    """

    cosine_mean: float
    cosine_min: float
    relative_error: float
    nn_agreement: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fidelity:
        """Inverse of `to_json`."""
        return cls(**data)


def main_output(outputs: Any) -> Tensor:
    """The first floating tensor of a model's outputs (tuple, dict or dataclass).

    Raises:
        FitError: there is none.
    """
    leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise FitError("the model has no floating output to compare")


def token_mask(batch: Mapping[str, Tensor], output: Tensor) -> Tensor | None:
    """The padding mask [B, T] (float, 1 = real token) that fits `output` [B, T, C], or None."""
    if output.ndim != 3:
        return None
    for name in MASKS:
        mask = batch.get(name)
        if mask is not None and mask.shape == output.shape[:2]:
            return (mask != 0).to(output.dtype)
    return None


def embedding(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """One vector a sample, [B, C]: the mean over visible tokens of the main output."""
    out = main_output(outputs)
    if out.ndim < 2:
        return out.reshape(-1, 1)
    if out.ndim != 3:
        return out.flatten(1)
    mask = token_mask(batch, out)
    if mask is None:
        return out.mean(1)
    return (out * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def visible(out: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """`out` with padded token rows set to zero."""
    mask = token_mask(batch, out)
    return out if mask is None else out * mask[..., None]


@torch.no_grad()
def run_outputs(
    module: nn.Module, batches: Iterable[Mapping[str, Tensor]], metric: Metric | None = None
) -> tuple[list[Tensor], Tensor]:
    """(main outputs without padding, one a batch; embeddings of all samples [N, C])."""
    outs, rows = [], []
    for batch in batches:
        outputs = module(**batch)
        outs.append(visible(main_output(outputs), batch).float())
        rows.append((metric or embedding)(outputs, batch).float())
    return outs, torch.cat(rows)


def nearest(vectors: Tensor) -> Tensor:
    """Index [N] of each vector's nearest other vector by cosine; vectors [N, C]."""
    unit = F.normalize(vectors.double(), dim=-1)
    near = unit @ unit.T
    near.fill_diagonal_(-torch.inf)
    return near.argmax(1)


def compare(
    original: tuple[Sequence[Tensor], Tensor], rewritten: tuple[Sequence[Tensor], Tensor]
) -> Fidelity:
    """`Fidelity` from two results of `run_outputs` on the same batches."""
    (outs_a, rows_a), (outs_b, rows_b) = original, rewritten
    cosine = F.cosine_similarity(rows_a.double(), rows_b.double(), dim=-1)
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(outs_a, outs_b, strict=True))
    size = sum(float(a.double().square().sum()) for a in outs_a)
    agree = None
    if len(rows_a) >= FEWEST:
        agree = float((nearest(rows_a) == nearest(rows_b)).double().mean())
    return Fidelity(
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        relative_error=(wrong / max(size, 1e-30)) ** 0.5,
        nn_agreement=agree,
        samples=len(rows_a),
    )


def fidelity(
    original: nn.Module,
    rewritten: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    metric: Metric | None = None,
) -> Fidelity:
    """Both models on the same batches.

    Args:
        original, rewritten: called as ``module(**batch)``.
        batches: at least one dict of tensors.
        metric: turns (outputs, batch) into the vectors [B, C] that are compared; by default the
            mean over visible tokens.

    Raises:
        FitError: no batches, or no floating output.
    """
    if not batches:
        raise FitError("fidelity needs at least one batch")
    return compare(run_outputs(original, batches, metric), run_outputs(rewritten, batches, metric))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference by the norm of `want`, in float64."""
    wrong = (got.double() - want.double()).norm()
    return float(wrong / want.double().norm().clamp_min(1e-30))
