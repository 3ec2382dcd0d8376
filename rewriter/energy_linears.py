"""Linear layers that do not multiply, in the counting rule and on the accelerator model.

The counting rule is EcoFormer's, taken on to codes: what is added up is charged, so a shift layer
costs a shift and an addition where a linear layer costs a multiplication and an addition.

    shift          shift terms * r*K*N, add terms * r*K*N; shift r*N for the outputs' own powers
    shiftadd_ptq   inputs times alphas: shift r*K*bits*terms, add r*K*bits*(terms - 1);
                   signed sums: add r*K*N*bits; shift r*N
    moe            router: mul and add 2*r*K; then either expert for its tokens, in inverse ratio
                   of their latencies
    another form   as its `ops` say

for r rows, K inputs, N outputs. Biases, the choice of an expert and its gate are free. Bytes are
those an artifact holds: packed codes, scales and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from codegen.eyeriss import Kind, Nest
from passes.errors import UnmatchedRule
from passes.linear_form import LinearForm, LinearSpec, linear_form_named
from passes.linear_forms._codes import PANEL, CodeSpec
from passes.linear_forms.moe import Moe
from passes.linear_forms.shift import Shift
from passes.linear_forms.shiftadd_ptq import ShiftAddPtq
from passes.linear_layers import LinearLayer, find_linears
from passes.linears import plan_linears
from passes.opcount import OpCount
from passes.plan import Choice
from passes.site import SiteStatus

WORD = 4  # bytes of a packed word, a scale and an uncoded weight


@dataclass(frozen=True)
class Coded:
    """A linear layer and the form that stands there."""

    form: LinearForm
    spec: LinearSpec


def choices_of(
    module: GraphModule, linear: Any, known: Mapping[str, Choice]
) -> Mapping[str, Choice]:
    """What each linear layer becomes: by a request (rewriter/linear_work.py), else by a plan."""
    from rewriter.linear_work import linear_rules

    if linear:
        return plan_linears(find_linears(module), linear_rules(linear))
    return known


def coded_layers(module: GraphModule, choices: Mapping[str, Choice]) -> dict[str, Coded]:
    """The changed layers by the name of their node; no weight is read.

    Raises:
        UnmatchedRule: a choice for a layer that the graph does not have.
    """
    layers = {layer.id: layer for layer in find_linears(module)}
    unknown = [i for i in choices if i not in layers]
    if unknown:
        raise UnmatchedRule(
            f"plan names linear layer {unknown[0]!r}; there are: {', '.join(layers) or 'none'}"
        )
    return {
        layers[i].node: _coded(layers[i], choice)
        for i, choice in choices.items()
        if choice.status is SiteStatus.REWRITTEN
    }


def _coded(layer: LinearLayer, choice: Choice) -> Coded:
    form = linear_form_named(choice.form, choice.config)
    bias = layer.bias is not None
    spec = LinearSpec(form.name, layer.inputs, layer.outputs, bias, form.config.to_json())
    return Coded(form, spec)


def counted(coded: Coded, rows: int) -> OpCount:
    """Operations of one call on `rows` rows by the rule."""
    form, k, n = coded.form, coded.spec.inputs, coded.spec.outputs
    if isinstance(form, Shift):
        products = form.config.terms * rows * k * n
        scales = rows * n if form.config.base == "row" else 0
        return OpCount.of("int32", shift=products + scales) + OpCount.of(add=products)
    if isinstance(form, ShiftAddPtq):
        scaled = rows * k * form.config.bits
        shifts = scaled * form.config.terms + rows * n
        return OpCount.of("int32", shift=shifts) + OpCount.of(
            add=scaled * (form.config.terms - 1) + scaled * n
        )
    if isinstance(form, Moe):
        first = multiplied(form, coded.spec, rows)
        rest = counted(Coded(form.shift, coded.spec), rows - first)
        products = 2 * rows * k + first * k * n
        return OpCount.of(mul=products, add=products) + rest
    return form.ops(coded.spec, rows)


def multiplied(form: Moe, spec: LinearSpec, rows: int) -> int:
    """Rows that a balanced mixture sends to its product."""
    slow, fast = form.times(spec)
    return round(rows * fast / (slow + fast))


def plain_bytes(inputs: int, outputs: int, bias: bool) -> int:
    """Bytes of a float32 layer."""
    return WORD * outputs * (inputs + bias)


def packed_bytes(coded: Coded) -> int | None:
    """Bytes of the tensors of `LinearForm.pack` and the bias; None for a form not known here."""
    form, spec = coded.form, coded.spec
    k, n = spec.inputs, spec.outputs
    rest = WORD * n * (1 + spec.bias)
    if isinstance(form, Shift):
        return _words(form.codes, spec) + rest
    if isinstance(form, ShiftAddPtq):
        return _words(form.codes, spec) + rest + WORD * k * form.config.bits
    if isinstance(form, Moe):
        padded = -(-n // PANEL) * PANEL
        return _words(form.shift.codes, spec) + rest + WORD * k * (padded + 2)
    return None


def _words(codes: CodeSpec, spec: LinearSpec) -> int:
    return WORD * -(-spec.outputs // PANEL) * PANEL * -(-spec.inputs // codes.per)


def nests(coded: Coded, rows: int) -> tuple[Nest, ...] | None:
    """The layer on the accelerator model; None for a form it does not know how to feed."""
    form, k, n = coded.form, coded.spec.inputs, coded.spec.outputs
    if isinstance(form, Shift) and form.config.terms == 1:
        return (Nest(rows, n, k, kind=Kind.SHIFT),)
    if isinstance(form, Moe):
        first = multiplied(form, coded.spec, rows)
        made = [Nest(rows, 2, k)]
        made += [Nest(first, n, k)] if first else []
        made += [Nest(rows - first, n, k, kind=Kind.SHIFT)] if rows > first else []
        return tuple(made)
    return None
