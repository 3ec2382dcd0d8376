"""Shift layers in int32 fixed point: shifts, signs and additions, no product and no float inside.

An activation is ``floor(x * 2^f)``, kept within `limit`; NaN is 0. A product with s 2^-p is
``s * (x >> p)`` (arithmetic, towards minus infinity: it loses less than one unit 2^-f), their sum
is shifted once by the output's own power of two, and the bias is added in fixed point. `limit` is
the largest activation for which no sum can leave int32, whatever the inputs; it follows from the
weights alone. Published (DeepShift): 16 bits before and 16 behind the point.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from passes.errors import FormError
from passes.linear_form import LinearSpec
from passes.linear_forms._codes import PANEL, CodeSpec, unpack, value_of
from passes.opcount import OpCount

TOP = 2**31 - 1
MOST = 1 << 30  # of an activation: float32 holds it, and so does every shift
ROWS = 4  # that share the codes of a word


def row_tile(rows: int) -> int:
    """Rows the kernel computes side by side; their number is rounded up to it."""
    return min(rows, ROWS)


def levels(spec: CodeSpec) -> list[tuple[int, list[int]]]:
    """(right shift p, the sign of its term for each code: -1, 0 or 1)."""
    count, half = 1 << spec.bits, 1 << (spec.bits - 1)
    sign = [1 if c < half else -1 for c in range(count)]
    if spec.terms == 1:
        found = {half - 1 - e: [e] for e in range(1, half)}
        fields = [(p, [c & (half - 1) for c in range(count)], known) for p, known in found.items()]
    else:
        first = [(6 - 2 * a, [(c >> 2) & 3 for c in range(count)], [a]) for a in (1, 2, 3)]
        second = [(7 - 2 * b, [c & 3 for c in range(count)], [b]) for b in (1, 2, 3)]
        fields = first + second
    return [
        (p, [s if f in known else 0 for s, f in zip(sign, field, strict=True)])
        for p, field, known in fields
    ]


def packed_fixed(
    codes: Tensor, base: Tensor, bias: Tensor | None, spec: CodeSpec, fraction: int
) -> dict[str, Tensor]:
    """`base` int32 [N], `offset` int32 [N] (the bias) and `limit` int32 [1].

    Raises:
        FormError: a bias that is not finite or out of range, or sums that leave no room.
    """
    outputs, inputs = codes.shape
    whole = torch.zeros(outputs) if bias is None else bias.detach().float().cpu()
    if not bool(whole.isfinite().all()):
        raise FormError("shift: the bias has values that are not finite")
    offset = torch.floor(whole.double() * 2.0**fraction)
    if float(offset.abs().max()) > TOP / 2:
        raise FormError(
            f"shift: a bias of {float(whole.abs().max()):g} does not fit into int32 with "
            f"{fraction} bits behind the point; use a smaller fraction"
        )
    power = base.detach().cpu().double()
    size = value_of(codes.cpu(), spec, torch.float64).abs().sum(1)
    room = torch.floor((TOP - 1 - offset.abs()) / torch.exp2(power.clamp_min(0)))
    most = torch.floor((room - inputs * spec.terms) / size.clamp_min(1))
    limit = min(int(most.min()), MOST)
    if limit < 1 << fraction:
        raise FormError(
            f"shift: with {fraction} bits behind the point sums over {inputs} inputs can leave "
            f"int32 for activations above {max(limit, 0) / 2**fraction:.2g}; use a smaller fraction"
        )
    spare = max(0, limit.bit_length() - 24)  # float32 must hold it
    return {
        "base": power.clamp(-31, 31).int(),
        "offset": offset.int(),
        "limit": torch.tensor([limit >> spare << spare], dtype=torch.int32),
    }


def run_fixed(
    spec: LinearSpec, codes: CodeSpec, packed: Mapping[str, Tensor], fraction: int, x: Tensor
) -> Tensor:
    """The layer as the kernel computes it, digit by digit: x [.., K] -> [.., N] in x's dtype."""
    limit = float(packed["limit"][0])
    whole = torch.floor(torch.nan_to_num(x.double(), nan=0.0) * 2.0**fraction).clamp(-limit, limit)
    found = unpack(packed["words"], codes, (spec.outputs, spec.inputs))
    total = whole.new_zeros(*x.shape[:-1], spec.outputs)
    for power, signs in levels(codes):
        chosen = torch.tensor(signs, dtype=torch.float64, device=x.device)[found]
        total = total + torch.floor(whole / 2.0**power) @ chosen.T
    moved = torch.floor(total * torch.exp2(packed["base"].double()))
    return ((moved + packed["offset"].double()) / 2.0**fraction).to(x.dtype)


def fixed_ops(codes: CodeSpec, spec: LinearSpec, rows: int) -> OpCount:
    """Operations and bytes of one product on `rows` rows, with the two conversions.

    in            float32 select, mul and round 1, max 2; int32 add 1 for each input
    products      uint32 shift 5 (two terms: 9), add a term; int32 shift and select a term, xor 1,
                  add terms + 2 (the sign twice, the sum)
    out           int32 shift 2, select 1, add 2; float32 mul 1 for each output
    """
    panels, groups = -(-spec.outputs // PANEL), -(-spec.inputs // codes.per)
    tile, t = row_tile(rows), codes.terms
    words = panels * groups * PANEL
    many = -(-rows // tile) * tile * words * codes.per
    inputs, outputs = rows * spec.inputs, rows * spec.outputs
    product = OpCount.of("uint32", shift=5 if t == 1 else 9, add=t)
    product += OpCount.of("int32", shift=t, select=t, xor=1, add=t + 2)
    ends = OpCount.of(
        "int32", shift=2 * outputs, select=outputs, add=inputs + 2 * outputs
    ) + OpCount.of(mul=inputs + outputs, round=inputs, max=2 * inputs, select=inputs)
    read = 4 * (2 * inputs + 1 + words + 2 * spec.outputs + outputs)
    return product * many + ends + OpCount.of(read=read, written=4 * (inputs + 2 * outputs))
