"""Form: one way to compute (or approximate) an attention, with everything the house asks of it.

A form is one file in passes/forms/ with one subclass of `Form`. It is found by discovery; a
third party registers one by the entry point group ``attention_rewriter.forms``.

Tensors everywhere: q [B, H, T, D], k [B, G, S, D], v [B, G, S, E], output [B, H, T, E];
`key_mask` [B or 1, S] bool, True where the key may be seen; `bias` a float tensor (added to the
scaled logits) or bool tensor (True = may be seen), broadcastable to [B, H, T, S].
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from passes.errors import UnknownName, UsageError
from passes.opcount import OpCount
from passes.site import AttentionSite, Dims, Mask

if TYPE_CHECKING:
    import torch

Params: TypeAlias = Mapping[str, "torch.Tensor"]


class Reason(StrEnum):
    """Stable codes of refusal."""

    MASK_BIAS = "M01"
    MASK_UNKNOWN = "M02"
    MASK_WINDOW = "M03"
    MASK_CAUSAL = "M04"
    MASK_PADDING = "M05"
    CROSS = "C01"
    HEAD_DIM = "D01"
    GROUPED = "G01"
    DTYPE = "T01"
    DROPOUT = "P01"
    LENGTH = "L01"
    SHARED = "S01"


@dataclass(frozen=True)
class Verdict:
    """Yes, or a reason why not. Falsy when it is a refusal."""

    ok: bool
    reason: Reason | None = None
    detail: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "yes" if self.ok else f"{self.reason}: {self.detail}"


YES = Verdict(True)


def no(reason: Reason, detail: str) -> Verdict:
    """A refusal with its code and a sentence a user can act on."""
    return Verdict(False, reason, detail)


@dataclass(frozen=True)
class Paper:
    """Where a form comes from."""

    authors: str
    title: str
    year: int
    link: str = ""


@dataclass(frozen=True)
class FormSpec:
    """All that fixes a form's function besides its parameters and tensors; JSON round trip.

    `scale` multiplies q.k; `window` is (left, right) or None; `config` is the form's own;
    `relative` is what is known of the mask's bias (passes/site.py).
    """

    form: str
    causal: bool
    scale: float
    window: tuple[int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    relative: tuple[int, ...] | None = None

    def dumps(self) -> str:
        """Canonical JSON text."""
        return json.dumps({**asdict(self), "config": dict(self.config)}, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> FormSpec:
        """Inverse of `dumps`."""
        data = json.loads(text)
        for name in ("window", "relative"):
            if data.get(name) is not None:
                data[name] = tuple(data[name])
        return cls(**data)


@dataclass(frozen=True)
class FormConfig:
    """Base of a form's options; subclasses are frozen dataclasses with plain JSON fields."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FormConfig:
        """Options from plain data; an unknown option is an error that names the known ones."""
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise UnknownName("option", name, known)
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Form(ABC):
    """One way to compute attention. Instances are cheap and hold only their config."""

    name: ClassVar[str]
    family: ClassVar[str]  # "exact", "kernelised", "hashing", "sparse", "low-rank"
    paper: ClassVar[Paper]
    formula: ClassVar[str]
    exact: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    needs: ClassVar[str] = "nothing"  # or "short fit", "training"
    straight_through: ClassVar[bool] = False  # piecewise constant in q and k: gradients are made up
    weighted: ClassVar[bool] = True  # the output is `weights` times the values
    free: ClassVar[frozenset[str]] = frozenset()  # trained parameters of a form not `trainable`
    normalised: ClassVar[bool] = True  # rows of `weights` sum to one, weights @ v is the output
    local: ClassVar[bool] = False  # a query sees keys near it only, which may all be hidden
    Config: ClassVar[type[FormConfig]] = FormConfig

    def __init__(self, config: FormConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, FormConfig):
            config = self.Config.from_json(config or {})
        self.config = config

    @abstractmethod
    def applies(self, site: AttentionSite) -> Verdict:
        """Whether this form can stand at `site`. Total: never raises."""

    def spec(self, site: AttentionSite) -> FormSpec:
        """The static facts of this form at `site`."""
        mask = site.mask
        config = self.config.to_json()
        return FormSpec(self.name, mask.causal, site.scale, mask.window, config, mask.relative)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """Initial trainable parameters, by name, float32; {} for a form without any."""
        return {}

    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters, sorted: the order in which a sealed graph passes them."""
        dims = Dims(B=1, H=1, G=1, T=64, S=64, D=64, E=64)
        site = AttentionSite("any", "any", dims, "float32", 0.125, Mask())
        return tuple(sorted(self.init_params(site)))

    @abstractmethod
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
        """The attention in plain differentiable torch: [B, H, T, E] in q's dtype."""

    @abstractmethod
    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention weights [B, H, T, S] (rows sum to one); quadratic, for fit and tests."""

    @abstractmethod
    def ops(self, site: AttentionSite) -> OpCount:
        """Operations of one call at `site` (static dims), in closed form, as the kernel does."""

    def counted(self, site: AttentionSite) -> OpCount:
        """Operations of one call as `rewriter energy --model count` charges them.

        A form from a paper with a counting rule of its own overrides this; else it is `ops`.
        """
        return self.ops(site)

    def rewires(self, site: AttentionSite) -> tuple[str, ...]:
        """Changes of the graph around `site` that this form starts from (passes/rewire.py)."""
        return ()

    def learn(
        self,
        site: AttentionSite,
        params: Params,
        samples: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
        *,
        seed: int = 0,
        warm: bool = False,
    ) -> dict[str, torch.Tensor]:
        """New parameters from captured (q, k, key_mask), without gradients; {} for most forms.

        `warm` starts from the old ones (a refresh after the model has changed).
        """
        return {}

    def margin(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> float:
        """How far q and k are from where the output jumps (rounding can not carry them there)."""
        return float("inf")

    def spares(self, site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
        """Why a rule for all `sites` of a model should leave `site` as it is; "" if it should not.

        A rule that names the site by more than "*" is followed in any case.
        """
        return ""

    @abstractmethod
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
        """The same function through `kit` (codegen.kit.Kit); all values are kit's handles."""


_CACHE: dict[str, type[Form]] = {}


def _load_builtin() -> None:
    package = importlib.import_module("passes.forms")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"passes.forms.{info.name}")
        for value in vars(module).values():
            if _is_form(value) and value.__module__ == module.__name__:
                _register(value)


def _is_form(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Form) and hasattr(value, "name")


def _register(form: type[Form]) -> None:
    other = _CACHE.get(form.name)
    if other is not None and other is not form:
        raise UsageError(
            f"two forms are called {form.name!r}: {other.__module__} and {form.__module__}; "
            "rename one of them"
        )
    _CACHE[form.name] = form


def forms() -> dict[str, type[Form]]:
    """All forms by name: the files of passes/forms/ and the entry points, sorted by name."""
    if not _CACHE:
        try:
            _load_builtin()
            for entry in importlib.metadata.entry_points(group="attention_rewriter.forms"):
                _register(entry.load())
        except BaseException:
            _CACHE.clear()  # or the next call would pass over what went wrong
            raise
    return dict(sorted(_CACHE.items()))


def form_named(name: str, config: Mapping[str, Any] | None = None) -> Form:
    """An instance of the form called `name`; `UnknownName` with near names if there is none."""
    known = forms()
    if name not in known:
        raise UnknownName("form", name, known)
    return known[name](config)
