"""LinearForm: one way to compute a linear layer with weights that are not float32 numbers.

A linear form is one file in passes/linear_forms/ with one subclass; it is found by discovery, and
third parties register one by the entry point group ``attention_rewriter.linear_forms``. It is
independent of the forms of attention.

Tensors everywhere: x [..., K], weight [N, K], bias [N] or None, output [..., N].
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from passes.errors import FormError, UnknownName, UsageError
from passes.form import YES, FormConfig, Paper, Reason, Verdict, no
from passes.opcount import OpCount

if TYPE_CHECKING:
    import torch

    from passes.linear_layers import LinearLayer


@dataclass(frozen=True)
class LinearSpec:
    """All that fixes a linear layer's function besides its tensors; JSON round trip."""

    form: str
    inputs: int
    outputs: int
    bias: bool
    config: Mapping[str, Any] = field(default_factory=dict)

    def dumps(self) -> str:
        """Canonical JSON text."""
        return json.dumps({**asdict(self), "config": dict(self.config)}, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> LinearSpec:
        """Inverse of `dumps`."""
        return cls(**json.loads(text))


class LinearForm(ABC):
    """One way to compute a linear layer. Instances are cheap and hold only their config."""

    name: ClassVar[str]
    paper: ClassVar[Paper]
    formula: ClassVar[str]
    needs: ClassVar[str] = "nothing"  # or "training", "calibration"
    jumps: ClassVar[bool] = False  # piecewise in x: rounding carries a row over a threshold
    frozen: ClassVar[frozenset[str]] = frozenset()  # parameters without a gradient
    Config: ClassVar[type[FormConfig]] = FormConfig

    def __init__(self, config: FormConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, FormConfig):
            config = self.Config.from_json(config or {})
        self.config = config

    def applies(self, layer: LinearLayer) -> Verdict:
        """Whether this form can stand at `layer`. Total: never raises."""
        if layer.shared:
            return no(Reason.SHARED, f"its weight is also used by {layer.shared}")
        if layer.dtype != "float32":
            return no(Reason.DTYPE, f"its weight is {layer.dtype}, and codes are made of float32")
        return YES

    @abstractmethod
    def convert(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Parameters by name from a trained weight [N, K]; "bias" [N] is among them if given.

        `x` [rows, K] are captured inputs, for forms that need them. FormError for a weight with
        values that are not finite.
        """

    @abstractmethod
    def weight(self, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [N, K] that is multiplied with; gradients pass the rounding unchanged."""

    def forward(
        self,
        params: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer in plain differentiable torch: [..., N] in x's dtype.

        `weight` is that of `self.weight`, where the caller has it.
        """
        from torch.nn.functional import linear

        bias = params.get("bias")
        weight = (self.weight(params) if weight is None else weight).to(x.dtype)
        return linear(self.inputs(x), weight, None if bias is None else bias.to(x.dtype))

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What the weight is multiplied with: x itself unless the form rounds activations."""
        return x

    @abstractmethod
    def pack(self, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors an artifact holds, by name; `bias` is added by the caller."""

    @abstractmethod
    def packed_names(self, spec: LinearSpec) -> tuple[str, ...]:
        """Names of `pack`'s tensors in the order in which a sealed graph passes them."""

    @abstractmethod
    def unpack(self, spec: LinearSpec, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [N, K] that packed tensors stand for."""

    def run_packed(
        self, spec: LinearSpec, packed: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """The layer from packed tensors, as a sealed graph runs in torch: [..., N]."""
        from torch.nn.functional import linear

        weight, bias = self.unpack(spec, packed).to(x.dtype), packed.get("bias")
        return linear(self.inputs(x), weight, None if bias is None else bias.to(x.dtype))

    @abstractmethod
    def ops(self, spec: LinearSpec, rows: int) -> OpCount:
        """Operations of one call on `rows` rows in closed form, as the kernels do."""

    @abstractmethod
    def kernel(self, kit: Any, spec: LinearSpec, packed: Mapping[str, Any], x: Any) -> Any:
        """The same function through `kit` (codegen.kit_linear.LinearKit)."""


def finite(weight: torch.Tensor, form: str) -> torch.Tensor:
    """`weight` as float32; FormError if a value is not finite."""
    if not bool(weight.isfinite().all()):
        raise FormError(
            f"{form}: the weight has values that are not finite; keep this layer out "
            "(linear='form,pattern') or repair the model"
        )
    return weight.detach().float()


@functools.cache
def linear_forms() -> Mapping[str, type[LinearForm]]:
    """All linear forms by name, sorted: the files of passes/linear_forms/ and the entry points."""
    found: dict[str, type[LinearForm]] = {}
    package = importlib.import_module("passes.linear_forms")
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"passes.linear_forms.{info.name}")
            for value in vars(module).values():
                if _is_form(value) and value.__module__ == module.__name__:
                    _register(found, value)
    for entry in importlib.metadata.entry_points(group="attention_rewriter.linear_forms"):
        _register(found, entry.load())
    return dict(sorted(found.items()))


def _is_form(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, LinearForm) and hasattr(value, "name")


def _register(found: dict[str, type[LinearForm]], form: type[LinearForm]) -> None:
    if form.name in found:
        other = found[form.name]
        raise UsageError(
            f"two linear forms are called {form.name!r}: {other.__module__} and "
            f"{form.__module__}; rename one of them"
        )
    found[form.name] = form


def linear_form_named(name: str, config: Mapping[str, Any] | None = None) -> LinearForm:
    """An instance of the linear form called `name`; `UnknownName` if there is none."""
    known = linear_forms()
    if name not in known:
        raise UnknownName("linear form", name, known)
    return known[name](config)
