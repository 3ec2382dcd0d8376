"""Sites, inputs and float64 references for the tests of kernels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from codegen.kit_build import BuiltForm, build_form, run_built
from codegen.target import Target, target_named
from passes.form import Form, form_named
from passes.site import AttentionSite, Dims, Mask


@dataclass(frozen=True)
class Case:
    B: int = 1
    H: int = 2
    G: int = 2
    T: int = 33
    S: int = 33
    D: int = 32
    E: int = 32
    causal: bool = False
    window: tuple[int, int] | None = None
    key_rows: int = 0  # first size of the key mask; 0: no key mask
    bias: tuple[int, ...] | None = None
    bias_bool: bool = False
    dtype: str = "float32"

    @property
    def site(self) -> AttentionSite:
        dims = Dims(self.B, self.H, self.G, self.T, self.S, self.D, self.E)
        mask = Mask(self.causal, self.key_rows > 0, self.window, bias=self.bias is not None)
        return AttentionSite("s#0", "n", dims, self.dtype, self.D**-0.5, mask)

    def __str__(self) -> str:
        plain = Case()
        changed = {n: v for n, v in vars(self).items() if v != getattr(plain, n)}
        return " ".join(f"{n}={v}" for n, v in changed.items()) or "plain"


@dataclass
class Trial:
    form: Form
    case: Case
    arrays: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    target: Target = field(default_factory=lambda: target_named("cpu"))

    @property
    def spec(self) -> Any:
        return self.form.spec(self.case.site)

    def build(self, precision: str = "fp32") -> BuiltForm:
        given = (self.spec, self.params, self.arrays, self.target)
        return build_form(self.form, *given, precision)

    def run(self, built: BuiltForm | None = None) -> np.ndarray:
        return run_built(built or self.build(), self.arrays, self.params)

    def reference(self, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """The form's own torch code in `dtype`."""
        wide = {n: torch.from_numpy(a) for n, a in self.arrays.items()}
        q, k, v = (wide[n].to(dtype) for n in "qkv")
        bias = wide.get("bias")
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(dtype)
        params = {n: torch.from_numpy(p).to(dtype) for n, p in self.params.items()}
        out = self.form.attend(self.spec, params, q, k, v, wide.get("key_mask"), bias)
        return out.numpy()


def trial(name: str, case: Case, rng: np.random.Generator) -> Trial:
    form = form_named(name)
    c = case

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(c.dtype)

    arrays = {
        "q": normal(c.B, c.H, c.T, c.D),
        "k": normal(c.B, c.G, c.S, c.D),
        "v": normal(c.B, c.G, c.S, c.E),
    }
    if c.key_rows:
        arrays["key_mask"] = rng.random((c.key_rows, c.S)) > 0.4
    if c.bias is not None:
        arrays["bias"] = rng.random(c.bias) > 0.4 if c.bias_bool else normal(*c.bias)
    params = {
        n: (p.numpy() + 0.3 * rng.normal(size=p.shape)).astype("float32")
        for n, p in form.init_params(c.site).items()
    }
    made = Trial(form, case, arrays, params)
    # Where the output jumps, float32 and float64 may stand on different sides: draw again.
    return made if _margin(made) > 1e-5 else trial(name, case, rng)


def _margin(t: Trial) -> float:
    q, k = (torch.from_numpy(t.arrays[n]).double() for n in "qk")
    params = {n: torch.from_numpy(p).double() for n, p in t.params.items()}
    return t.form.margin(t.spec, params, q, k)


def with_target(t: Trial, **changes: Any) -> Trial:
    return replace(t, target=replace(t.target, **changes))
