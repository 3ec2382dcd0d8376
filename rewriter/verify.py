"""Is the compiled code the model it was compiled from? And how alike are rewritten and original?

Two different questions, never mixed: `verify_artifact` compares with a tolerance and fails;
`compare_models` measures a fidelity and never fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import UnknownName, VerifyError

if TYPE_CHECKING:
    import torch

    from rewriter.fidelity import Fidelity

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal: both bounds are relative to the size of the wanted output.

    `largest` bounds the largest difference by the largest wanted value (or 1 if that is
    smaller), `rms` the root mean square of the difference by that of the wanted output.
    """

    largest: float
    rms: float


# The one table of tolerances, by the lowest precision the compiled code computes in. Rounding
# errors of a deep model add up to some tens of the type's own step (float32 6e-8, float16 5e-4,
# bfloat16 4e-3); a wrong kernel is wrong by far more.
TOLERANCES: Mapping[str, Tolerance] = {
    "float64": Tolerance(1e-9, 1e-10),
    "float32": Tolerance(1e-4, 1e-5),
    "float16": Tolerance(3e-2, 5e-3),
    "bfloat16": Tolerance(1e-1, 3e-2),
    "int8": Tolerance(3e-1, 1.5e-1),
}


# Whose tolerance a model with codes is held to if it misses its own (see `jumps`).
JUMPS = "bfloat16"


def tolerance_of(dtype: str) -> Tolerance:
    """The tolerance for code that computes in `dtype` ("torch.float32" is understood too)."""
    name = str(dtype).removeprefix("torch.")
    if name not in TOLERANCES:
        raise UnknownName("dtype", name, TOLERANCES)
    return TOLERANCES[name]


@dataclass(frozen=True)
class ErrorStats:
    """How far compiled outputs are from wanted ones; the worst over all outputs.

    `max_rel` is |difference| / (|wanted| + rms of wanted), so zeros do not blow it up.
    `rms_ratio` is rms(difference) / rms(wanted); `cosine_min` the lowest cosine over rows of the
    last axis. `tolerance` is the bound `max_abs` was held against. `why` says what failed.
    """

    max_abs: float
    max_rel: float
    rms_ratio: float
    cosine_min: float
    tolerance: float
    rms_tolerance: float
    dtype: str
    ok: bool
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ErrorStats:
        """Inverse of `to_json`."""
        return cls(**data)

    def require(self) -> ErrorStats:
        """These stats, or `VerifyError` if they are not within tolerance."""
        if not self.ok:
            raise VerifyError(
                f"the compiled code does not agree with the model it was compiled from: {self.why}"
            )
        return self


def compare_arrays(
    got: Mapping[str, Array], want: Mapping[str, Array], *, dtype: str = "float32"
) -> ErrorStats:
    """Compare outputs by name, in float64.

    Raises:
        VerifyError: the names or shapes differ, or there is nothing to compare.
        UnknownName: no tolerance is known for `dtype`.
    """
    tolerance = tolerance_of(dtype)
    if list(got) != list(want) or not want:
        raise VerifyError(f"outputs differ: got {list(got)}, wanted {list(want)}")
    parts = [_compare_one(name, got[name], want[name], tolerance, dtype) for name in want]
    bad = [p.why for p in parts if not p.ok]
    return ErrorStats(
        max_abs=_worst([p.max_abs for p in parts]),
        max_rel=_worst([p.max_rel for p in parts]),
        rms_ratio=_worst([p.rms_ratio for p in parts]),
        cosine_min=min(p.cosine_min for p in parts),
        tolerance=min(p.tolerance for p in parts),
        rms_tolerance=tolerance.rms,
        dtype=str(dtype).removeprefix("torch."),
        ok=not bad,
        why="; ".join(bad),
    )


def _worst(values: Sequence[float]) -> float:
    return max(values)


def _compare_one(
    name: str, got: Array, want: Array, tolerance: Tolerance, dtype: str
) -> ErrorStats:
    if got.shape != want.shape:
        raise VerifyError(f"output {name!r}: shape {got.shape}, wanted {want.shape}")
    exact = not np.issubdtype(np.asarray(want).dtype, np.floating)
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # equal infinities too
    lost = ~same & ~(np.isfinite(a) & np.isfinite(b))
    with np.errstate(invalid="ignore"):  # infinity less infinity
        diff = np.where(same, 0.0, np.abs(a - b))
    diff[lost] = np.inf
    size = np.where(np.isfinite(b), np.abs(b), 0.0)
    rms = float(np.sqrt(np.mean(size**2))) if b.size else 0.0
    top = float(diff.max(initial=0.0))
    bound = 0.0 if exact else tolerance.largest * max(1.0, float(size.max(initial=0.0)))
    ratio = float(np.sqrt(np.mean(diff**2))) / max(rms, 1e-30) if b.size else 0.0
    ok = top <= bound and (exact or top == 0.0 or ratio <= tolerance.rms)
    return ErrorStats(
        max_abs=top,
        max_rel=float((diff / (size + max(rms, 1e-30))).max(initial=0.0)),
        rms_ratio=ratio,
        cosine_min=1.0 if exact else _cosine_min(a, b),
        tolerance=bound,
        rms_tolerance=tolerance.rms,
        dtype=dtype,
        ok=ok,
        why="" if ok else _why(name, top, bound, ratio, tolerance, int(lost.sum())),
    )


def _why(name: str, top: float, bound: float, ratio: float, tolerance: Tolerance, lost: int) -> str:
    if lost:
        return f"output {name!r} has {lost} values that are not finite where the model's are"
    return (
        f"output {name!r} differs by up to {top:.3g} (allowed {bound:.3g}), "
        f"rms ratio {ratio:.3g} (allowed {tolerance.rms:.3g})"
    )


def _cosine_min(a: Array, b: Array) -> float:
    """Lowest cosine over rows of the last axis; rows that are zero or not finite in both pass."""
    rows_a, rows_b = (x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1) for x in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
        dots = (rows_a * rows_b).sum(1)
    usable = np.isfinite(norms) & (norms > 0)
    return float((dots[usable] / norms[usable]).min(initial=1.0))


def flat_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's outputs in order (tuple, dict, dataclass, nested)."""
    import torch
    from torch.utils import _pytree as pytree

    if isinstance(outputs, Mapping):
        outputs = dict(outputs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor as an array; bfloat16, which numpy lacks, as float32."""
    import torch

    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def verify_artifact(
    artifact: Any,
    module: Any,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    dtype: str | None = None,
) -> ErrorStats:
    """Run compiled code and the eager model it was made from on the same inputs.

    Args:
        artifact: has ``run({name: array}) -> {name: array}``, ``inputs`` and ``outputs`` (specs).
        module: the rewritten model, called with `inputs`.
        inputs: tensors by name, or a tuple in the order of the artifact's inputs.
        dtype: the lowest precision the code computes in, which picks the tolerance; by default
            the lowest of what the artifact's manifest says and of the model's own types.

    Raises:
        VerifyError: the number of outputs or their shapes differ.
    """
    import torch

    with torch.no_grad():
        wanted = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    arrays = _arrays(artifact, inputs)
    got = artifact.run(arrays)
    tensors = flat_tensors(wanted)
    if len(tensors) != len(got):
        raise VerifyError(f"the artifact has {len(got)} outputs, the model {len(tensors)}")
    want = {name: to_numpy(t) for name, t in zip(got, tensors, strict=True)}
    precision = getattr(getattr(artifact, "manifest", None), "precision", "float32")
    dtype = dtype or _lowest([precision, *_types(module, tensors)])
    return compare_outputs(got, want, module, dtype)


def compare_outputs(
    got: Mapping[str, Array], want: Mapping[str, Array], module: Any, dtype: str
) -> ErrorStats:
    """`compare_arrays`; by the tolerance of `JUMPS` where `module` jumps and misses its own."""
    stats = compare_arrays(got, want, dtype=dtype)
    if stats.ok or not jumps(module):
        return stats
    return replace(compare_arrays(got, want, dtype=_lowest([dtype, JUMPS])), dtype=stats.dtype)


def jumps(module: Any) -> bool:
    """Whether a form of the model has thresholds (codes, a router).

    Rounding then carries a value over its threshold now and then, and one code bit (or a token's
    expert) differs, however exact the code is: such a model is held to the tolerance of `JUMPS`
    where it misses its own.
    """
    from passes.linears import LinearModule
    from passes.substitute import AttentionModule

    parts = list(module.modules()) if hasattr(module, "modules") else []
    coded = any(isinstance(m, AttentionModule) and m.form.straight_through for m in parts)
    return coded or any(isinstance(m, LinearModule) and m.form.jumps for m in parts)


def _types(module: Any, outputs: Sequence[torch.Tensor]) -> list[str]:
    """Floating types of the model's own weights and outputs."""
    weights = module.parameters() if hasattr(module, "parameters") else ()
    found = {t.dtype for t in (*weights, *outputs) if t.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)


def _lowest(names: Sequence[str]) -> str:
    """The type of the least precision (the table is in that order)."""
    order = list(TOLERANCES)
    return max((n for n in names if n in order), key=order.index)


def _arrays(artifact: Any, inputs: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Array]:
    """The artifact's inputs as arrays of its dtypes; inputs it does not take are left out."""
    names = [spec.name for spec in artifact.inputs]
    if not isinstance(inputs, Mapping):
        tensors = [leaf for leaf in inputs if leaf is not None]
        if len(tensors) != len(names):
            raise VerifyError(f"{len(tensors)} inputs given, the artifact takes {', '.join(names)}")
        inputs = dict(zip(names, tensors, strict=True))
    missing = [n for n in names if n not in inputs]
    if missing:
        raise VerifyError(f"inputs lack {', '.join(missing)}, which the artifact takes")
    return {s.name: to_numpy(inputs[s.name]).astype(s.dtype) for s in artifact.inputs}


def compare_models(
    rewritten: Any, original: Any, batches: Sequence[Mapping[str, torch.Tensor]]
) -> Fidelity:
    """Measured resemblance of two models on the same batches (see rewriter/fidelity.py)."""
    from rewriter.fidelity import fidelity

    return fidelity(original, rewritten, batches)
