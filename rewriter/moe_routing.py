"""Where the tokens of two-expert layers go, and what the balance did while they were trained.

Plain data for the report (`RewriteReport.experts`) and the pictures of rewriter/moe_plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.linears import LinearModule
from passes.moe_balance import Balance

if TYPE_CHECKING:
    from rewriter.api import Result

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]
POINTS = 200  # of a history, at most
ROUTED = 8  # batches that are counted where none are set aside
PIXELS = 28  # a side of the image kept beside the maps, at most
GREYS = 16
PREFIX = 6  # tokens before the patches of an image, at most


@dataclass(frozen=True)
class Routed:
    """One layer: tokens at each expert, and for images which expert each patch of the first image
    went to: `patches` [rows][columns], 0 multiply or 1 shift; None where there is no such grid."""

    layer: str
    multiply: int
    shift: int
    patches: list[list[int]] | None = None

    @property
    def share(self) -> float:
        """Share of the tokens at the shift expert; 0 without tokens."""
        return self.shift / max(1, self.multiply + self.shift)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def routing(module: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Routed]:
    """How the two-expert layers of `module` route `batches` (its inputs by name).

    Raises:
        UsageError: the module has no two-expert layer.
    """
    counts: dict[str, list[int]] = {}
    patches: dict[str, list[list[int]]] = {}
    for number, batch in enumerate(batches):
        shapes: dict[str, torch.Size] = {}
        with Balance(module) as balance, _shapes(balance, shapes):
            module(**batch)
        for layer, logits in balance.logits.items():
            choice = (logits[:, 1] > logits[:, 0]).long()
            known = counts.setdefault(layer, [0, 0])
            known[1] += int(choice.sum())
            known[0] += len(choice) - int(choice.sum())
            grid = _grid(batch, shapes[layer]) if number == 0 else None
            if grid is not None:
                patches[layer] = _cut(choice, shapes[layer], grid)
    return [Routed(i, n[0], n[1], patches.get(i)) for i, n in counts.items()]


class _shapes:
    """Keeps the shapes of the layers' inputs while a model runs."""

    def __init__(self, balance: Balance, shapes: dict[str, torch.Size]) -> None:
        self.layers, self.shapes, self.hooks = balance.layers.values(), shapes, list[Any]()

    def __enter__(self) -> None:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, LinearModule)
            self.shapes[module.layer.id] = args[0].shape

        self.hooks = [layer.register_forward_pre_hook(keep) for layer in self.layers]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def thumbnail(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """The first image of a batch in a few grey levels, 0 to `GREYS` - 1; [] if it has none."""
    image = _image(batch)
    if image is None:
        return []
    grey = image[:1].float().mean(dim=1, keepdim=True)
    step = -(-max(grey.shape[2:]) // PIXELS)
    small = nn.functional.avg_pool2d(grey, step, ceil_mode=True)[0, 0]
    low, high = small.min(), small.max()
    made: list[list[int]] = (
        ((small - low) / (high - low + 1e-12) * (GREYS - 1)).round().int().tolist()
    )
    return made


def _image(batch: Mapping[str, Tensor]) -> Tensor | None:
    return next((v for v in batch.values() if v.dim() == 4 and v.shape[1] in (1, 3)), None)


def _grid(batch: Mapping[str, Tensor], shape: torch.Size) -> tuple[int, int, int] | None:
    """(tokens before the patches, rows, columns) of a layer's input [B, T, K] of an image model."""
    image = _image(batch)
    if image is None or len(shape) < 3 or shape[0] != image.shape[0]:
        return None
    tokens = math.prod(shape[1:-1])
    high, wide = int(image.shape[2]), int(image.shape[3])
    for before in range(PREFIX):
        rows = round(math.sqrt((tokens - before) * high / wide)) if tokens > before else 0
        if rows > 1 and rows * wide % high == 0 and rows * (rows * wide // high) == tokens - before:
            return before, rows, rows * wide // high
    return None


def _cut(choice: Tensor, shape: torch.Size, grid: tuple[int, int, int]) -> list[list[int]]:
    before, rows, columns = grid
    first = choice.reshape(shape[0], -1)[0, before:]
    made: list[list[int]] = first.reshape(rows, columns).tolist()
    return made


class Watched:
    """A task's loss and the balance of a model's experts, with what both were at each step::

        with Watched(Balance(model), task, 0.01) as watched:
            ...  # train on watched.loss(outputs, batch)
        watched.history()

    Only steps that train are kept, not the looks at batches set aside.
    """

    def __init__(self, balance: Balance, task: Loss, weight: float) -> None:
        self.balance, self.task, self.weight = balance, task, weight
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Watched:
        self.balance.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.balance.__exit__(kind, error, trace)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """task + weight * balance; call it after the model ran on `batch`."""
        task, balance = self.task(outputs, batch), self.balance.loss()
        if torch.is_grad_enabled():
            shares = [s["shift"] for s in self.balance.shares().values()]
            self.rows.append(
                {
                    "step": len(self.rows) + 1,
                    "task": float(task.detach()),
                    "balance": float(balance.detach()),
                    "shift": sum(shares) / len(shares),
                }
            )
        return task + self.weight * balance

    def history(self) -> list[dict[str, Any]]:
        """{"step", "task", "balance", "shift" (share of the tokens)} of at most `POINTS` steps."""
        every = max(1, -(-len(self.rows) // POINTS))
        return self.rows[::every]


def tell_routing(result: Result, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the routing of `result`'s model on `batches` into its report; nothing without `moe`."""
    from passes.linear_forms.moe import Moe
    from passes.linears import linear_modules

    module = result.rewritten.module
    if not any(isinstance(m.form, Moe) for m in linear_modules(module).values()):
        return
    names = {str(n.target) for n in module.graph.find_nodes(op="placeholder")}
    inputs = [{n: v for n, v in b.items() if n in names} for b in batches]
    rows = routing(module, inputs)
    image = thumbnail(inputs[0]) if any(row.patches for row in rows) else []
    result.report = result.report.with_experts(routing=[r.to_json() for r in rows], image=image)
