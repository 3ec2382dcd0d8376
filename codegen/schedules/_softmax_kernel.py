"""The PrimFunc of a softmax attention made by the kit, from whoever writes its statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codegen.kernels.attention import AttentionFacts
from codegen.kernels.tiles import build
from codegen.kernels.views import take_layout


def written(func: Any, data: dict[str, Any], write: Callable[..., None]) -> Any:
    """`func` with the body write(facts, q, k, v, key mask or None, bias or None, output).

    `data` are its facts; tensors are read through the views they tell.
    """
    layout = take_layout(data, 3)
    facts = AttentionFacts.from_json(data)

    def body(*args: Any) -> None:
        *inputs, out = args
        if layout is None:
            (q, k, v), rest = inputs[:3], inputs[3:]
        else:
            (q, k, v), rest = layout.split(inputs)
            out = layout.output(out, (*q.shape[:3], v.shape[3]))
        key_mask, bias = facts.split(rest)
        write(facts, q, k, v, key_mask, bias, out)

    return build(func, body)
