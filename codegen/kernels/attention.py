"""Definition of softmax attention: plain TE, the meaning that is counted; never run as it is.

Letters as in passes/site.py. The schedule is codegen/schedules/attention.py. Blocks start with
``attn_``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvm import te, tirx

from codegen.kernels.vector_math import f32

KERNEL = "rewriter.kernel"  # attribute of a PrimFunc: what a rule needs to know, as JSON
RULE = "rewriter.rule"  # attribute of a PrimFunc: the rule meant for it
MINIMUM = -3.4028234663852886e38
TINY = 1e-30  # below any sum that has a visible key (its largest term is 1)


def attributes(rule: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """PrimFunc attributes of a kit kernel; op_pattern 8 keeps fusion away from it."""
    known = json.dumps({"rule": rule, **(facts or {})}, sort_keys=True)
    return {"op_pattern": 8, RULE: rule, KERNEL: known}


def facts_of(func: Any, rule: str) -> dict[str, Any] | None:
    """The facts of a kit kernel meant for `rule`, None for any other PrimFunc."""
    attrs = func.attrs
    if attrs is None or KERNEL not in attrs:
        return None
    facts: dict[str, Any] = json.loads(str(attrs[KERNEL]))
    return facts if facts.pop("rule") == rule else None


@dataclass(frozen=True)
class AttentionFacts:
    """What the tensors of a softmax attention do not say.

    Inputs are q, k, v, then the key mask and the bias where present. `offset` is S - T.
    """

    scale: float
    causal: bool = False
    window: tuple[int, int] | None = None
    key_mask: bool = False
    bias: str = ""  # "", "add" (float) or "hide" (bool)

    @property
    def hides(self) -> bool:
        """Whether a key can be hidden (other than by -inf in a float bias)."""
        return self.causal or self.window is not None or self.key_mask or self.bias == "hide"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionFacts:
        """Inverse of `to_json`."""
        fields = dict(data)
        if fields["window"] is not None:
            fields["window"] = tuple(fields["window"])
        return cls(**fields)

    def split(self, rest: list[Any]) -> tuple[Any, Any]:
        """(key mask or None, bias or None) out of the inputs after v."""
        rest = list(rest)
        key_mask = rest.pop(0) if self.key_mask else None
        return key_mask, rest.pop(0) if self.bias else None

    def seen(self, i: Any, j: Any, offset: int, masks: list[Any]) -> Any:
        """Whether query i sees key j, as one boolean expression; None if every key is seen."""
        tests = list(masks)
        if self.causal:
            tests.append(j <= i + offset)
        if self.window is not None:
            left, right = self.window
            tests += [j >= i + offset - left, j <= i + offset + right]
        return tirx.all(*tests) if tests else None


def broadcast(tensor: Any, index: tuple[Any, ...]) -> Any:
    """An element of a tensor or buffer that broadcasts (size 1, or fewer axes) over `index`."""
    shape = [int(d) for d in tensor.shape]
    kept = index[len(index) - len(shape) :]
    at = tuple(0 if d == 1 else i for d, i in zip(shape, kept, strict=True))
    return tensor(*at) if isinstance(tensor, te.Tensor) else tensor[at]


def wide(value: Any, dtype: str) -> Any:
    """The value as float32."""
    return value if dtype == "float32" else tirx.Cast("float32", value)


def define(
    facts: AttentionFacts, q: Any, k: Any, v: Any, *rest: Any, tokens_first: bool = False
) -> Any:
    """Softmax attention [B, H, T, E] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E].

    With `tokens_first` the result is [B, T, H * E].
    """
    b_, h_, t_, d_ = (int(n) for n in q.shape)
    g_, s_, e_ = int(k.shape[1]), int(k.shape[2]), int(v.shape[3])
    group, offset, dtype = h_ // g_, s_ - t_, str(q.dtype)
    key_mask, bias = facts.split(list(rest))
    rows, pairs = (b_, h_, t_), (b_, h_, t_, s_)
    x = te.compute(q.shape, lambda *i: wide(q(*i), dtype), name="attn_wide")
    if facts.scale != 1.0:
        x = te.compute(
            q.shape, lambda *i: wide(q(*i), dtype) * f32(facts.scale), name="attn_scaled"
        )
    d = te.reduce_axis((0, d_), name="d")
    s = te.compute(
        pairs,
        lambda b, h, i, j: te.sum(x[b, h, i, d] * wide(k[b, h // group, j, d], dtype), axis=d),
        name="attn_scores",
    )
    if facts.bias == "add":
        s = _biased(s, bias)
    if facts.hides:
        s = _hidden(facts, s, key_mask, bias, offset)
    j0, j1, j2 = (te.reduce_axis((0, s_), name=f"j{n}") for n in range(3))
    m = te.compute(rows, lambda b, h, i: te.max(s[b, h, i, j0], axis=j0), name="attn_max")
    e = te.compute(pairs, lambda b, h, i, j: tirx.exp(s[b, h, i, j] - m[b, h, i]), name="attn_exp")
    z = te.compute(rows, lambda b, h, i: te.sum(e[b, h, i, j1], axis=j1), name="attn_sum")
    if facts.hides or facts.bias:
        total = z
        z = te.compute(rows, lambda *i: tirx.max(total(*i), f32(TINY)), name="attn_blind")
    o = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, c: te.sum(e[b, h, i, j2] * wide(v[b, h // group, j2, c], dtype), axis=j2),
        name="attn_values",
    )
    return arranged(
        (b_, h_, t_, e_),
        lambda b, h, i, c: (o[b, h, i, c] / z[b, h, i]).astype(dtype),
        "attn_out",
        tokens_first,
    )


def arranged(shape: tuple[int, ...], value: Any, name: str, tokens_first: bool) -> Any:
    """value(b, h, t, e) as a tensor [B, H, T, E], or [B, T, H * E] with `tokens_first`."""
    b_, h_, t_, e_ = shape
    if not tokens_first:
        return te.compute(shape, value, name=name)
    return te.compute((b_, t_, h_ * e_), lambda b, i, c: value(b, c // e_, i, c % e_), name=name)


def _biased(s: Any, bias: Any) -> Any:
    dtype = str(bias.dtype)
    return te.compute(
        s.shape, lambda *i: s(*i) + wide(broadcast(bias, i), dtype), name="attn_biased"
    )


def _hidden(facts: AttentionFacts, s: Any, key_mask: Any, bias: Any, offset: int) -> Any:
    def value(b: Any, h: Any, i: Any, j: Any) -> Any:
        masks = [] if key_mask is None else [broadcast(key_mask, (b, j))]
        if facts.bias == "hide":
            masks.append(broadcast(bias, (b, h, i, j)))
        return tirx.Select(facts.seen(i, j, offset, masks), s[b, h, i, j], f32(float("-inf")))

    return te.compute(s.shape, value, name="attn_hidden")
