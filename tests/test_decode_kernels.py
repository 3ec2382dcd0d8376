"""Step kernels of streaming forms alone: chunk by chunk equal to the steps in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx

from codegen.kit import Kit
from codegen.schedule import schedule
from codegen.target import target_named
from passes.decode_form import Streaming
from passes.form import form_named
from passes.site import AttentionSite, Dims, Mask

TARGET = target_named("cpu")


def built(form: Streaming, spec: Any, given: dict[str, Any], params: dict[str, Any]) -> Any:
    """A function (q, k, v, position, *state, *params) -> out that changes the state in place."""
    builder = relax.BlockBuilder()
    both = {**given, **params}
    names = {
        n: relax.Var(n, relax.TensorType(tuple(a.shape), str(a.dtype).removeprefix("torch.")))
        for n, a in both.items()
    }
    with builder.function("main", list(names.values())):
        with builder.dataflow():
            state = [names[n] for n in given if n.startswith("state")]
            out, new = form.step_kernel(
                Kit(builder, TARGET), spec, {n: names[n] for n in params},
                names["q"], names["k"], names["v"], state, names["position"],
            )  # fmt: skip
            result = builder.emit_output(relax.Tuple([out, *new]))
        builder.emit_func_output(result)
    mod = builder.get()
    for gv, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            mod[gv] = schedule(func, TARGET).func.with_attr("global_symbol", gv.name_hint)
    library = tvm.compile(mod, target=tvm.target.Target(dict(TARGET.tvm)))
    return relax.VirtualMachine(library, tvm.cpu())["main"]


@pytest.mark.parametrize(
    ("name", "config", "window"),
    [
        ("lolcats", {"window": 40}, None),  # a ring of 80 places in two blocks of the cache
        ("lolcats", {"window": 3}, None),
        ("cosformer", {"span": 210}, None),
        ("norm_linear", {}, None),
        ("exact", {}, (40, 0)),
        ("exact", {}, (64, 0)),
        ("window", {"left": 5}, None),
        ("window", {"left": 500}, None),
        ("clipped_softmax", {"gamma": -0.02, "zeta": 1.1}, None),
        ("clipped_softmax", {"gamma": -0.05}, (30, 0)),
        ("gated", {}, None),
        ("gaussian", {}, (70, 0)),
    ],
)
def test_the_kernel_is_the_step(
    name: str, config: dict[str, Any], window: tuple[int, int] | None
) -> None:
    form, chunk, tokens = form_named(name, config), 7, 203
    assert isinstance(form, Streaming)
    dims = Dims(B=2, H=6, G=2, T=chunk, S=chunk, D=12, E=20)
    place = AttentionSite("s#0", "n", dims, "float32", 0.3, Mask(True, window=window))
    spec = form.spec(place)
    params = {n: p + 0.2 * torch.randn_like(p) for n, p in form.init_params(place).items()}
    q = torch.randn(2, 6, tokens, 12)
    k, v = torch.randn(2, 2, tokens, 12), torch.randn(2, 2, tokens, 20)
    wide = {n: p.double() for n, p in params.items()}
    state = [s.zeros().double() for s in form.state(place, tokens)]
    kept = [tvm.runtime.tensor(s.zeros().numpy()) for s in form.state(place, tokens)]
    run = None
    for first in range(0, tokens, chunk):
        q_, k_, v_ = (x[:, :, first : first + chunk].contiguous() for x in (q, k, v))
        position = (first + torch.arange(chunk)).expand(2, chunk).contiguous()
        want, state = form.step(spec, wide, q_.double(), k_.double(), v_.double(), state, position)
        given = {"q": q_, "k": k_, "v": v_, "position": position}
        if run is None:
            held = {f"state{n}": s for n, s in enumerate(state)}
            shaped = {n: s.float() for n, s in held.items()}
            run = built(form, spec, {**given, **shaped}, params)
        fresh = [tvm.runtime.tensor(x.numpy()) for x in given.values()]
        rest = [tvm.runtime.tensor(p.numpy()) for p in params.values()]
        out = run(*fresh, *kept, *rest)[0].numpy()
        np.testing.assert_allclose(out, want.numpy(), rtol=2e-4, atol=2e-5)
    for mine, theirs in zip(kept, state, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=2e-4, atol=2e-4)
