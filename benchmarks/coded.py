"""``python -m benchmarks.coded``: kernels over codes at the shapes of ShiftAddViT's own.

Every kernel is verified against a float64 product first, then all kernels of a shape run in turns
in one process, so that what else the machine does meets them alike. Against them: our dense
kernels on the same numbers, and PyTorch in float32 and bfloat16. Writes the numbers as JSON and a
page with the table; about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# PyTorch's idle threads would spin on the cores that the next kernel needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from codegen.target import target_named, usable_cores

ROOT = Path(__file__).parent.parent
Array = NDArray[Any]
# (rows, inputs, outputs) and (batch, heads, tokens, width, bits): ShiftAddViT's MatShift, MatAdd.
PRODUCTS = (
    (3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128),
    (1, 768, 3072), (8, 768, 3072), (1, 4096, 4096),
)  # fmt: skip
SUMS = ((1, 1, 3136, 32, 16), (1, 2, 784, 32, 16), (1, 5, 196, 32, 16))
LINEAR = {
    "shift, 4 bits": ("shift", {}),
    "shift, 5 bits, two powers": ("shift", {"bits": 5, "terms": 2}),
    "shift, int32": ("shift", {"activations": "integer"}),
    "shiftadd_ptq, 4 bits": ("shiftadd_ptq", {"bits": 4}),
}
_ABOVE = """# Kernels over codes

Made by `python -m benchmarks.coded` ({when}, {threads} threads). Shapes are those of ShiftAddViT's
kernels (rows x inputs x outputs; batch x heads x tokens x width x bits) and of a few rows. Every
kernel was checked against a float64 product before; the error is the largest, of the largest
output. Times are medians of runs in turns in one process. Shares are of {gflops:.0f} GFLOP/s (of
the plain product, also where additions take its place) and of {gbytes:.0f} GB/s (inputs, weights
and output once; above 100 %: from the caches). PyTorch's idle threads sleep here: were they to
spin, they would slow whatever runs next. Waking them costs it something, so its best times are
the fairer ones.

| shape | kernel | median ms | best | PyTorch fp32 / it | error | of peak | of bandwidth |
|---|---|---|---|---|---|---|---|"""
LIMITS = {"PyTorch bf16": 2e-2, "shift, int32": 2e-3}  # largest error, of the largest output
LIMIT = 2e-5
SLOW = 1 << 22  # weights above which fitting binary codes takes too long for a run


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: milliseconds, its error, and its share of the machine's limits.

    `flops` counts the plain product, also where the kernel adds in its place; `moved` the bytes of
    its inputs, weights and output.
    """

    shape: str
    kernel: str
    best_ms: float
    median_ms: float
    error: float
    flops: int
    moved: int
    share_of_peak: float = 0.0
    share_of_bandwidth: float = 0.0


@dataclass(frozen=True)
class _Contender:
    name: str
    run: Callable[[], Any]  # one call; its result is an array or a tensor
    want: Array
    flops: int
    moved: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then write the JSON file and the page."""
    told = _arguments(argv)
    os.environ["TVM_NUM_THREADS"] = str(told.threads)
    torch.set_num_threads(told.threads)
    from benchmarks.peaks import measure

    peaks = measure(told.threads).to_json()
    rows = [row for shape in PRODUCTS for row in _timed(_name(shape), _linear(shape), told.seconds)]
    rows += [row for shape in SUMS for row in _timed(_name(shape), _sums(shape), told.seconds)]
    rows = [_shared(row, peaks) for row in rows]
    data = {"when": time.strftime("%Y-%m-%d"), "peaks": peaks, "rows": [asdict(r) for r in rows]}
    for path, text in ((told.json, json.dumps(data, indent=1) + "\n"), (told.page, page(data))):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_text(text)
        beside.replace(path)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coded", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seconds", type=float, default=6.0, help="for each shape")
    parser.add_argument("--json", type=Path, help="default: this machine's folder of results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coded-kernels.md")
    told = parser.parse_args(argv)
    if told.json is None:
        from benchmarks.run import results_folder

        told.json = results_folder(ROOT / "benchmarks" / "results") / "coded" / "kernels.json"
    return told


def _name(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)


def _linear(shape: tuple[int, int, int]) -> list[_Contender]:
    from codegen.kit_linear import LinearKit
    from passes.linear_form import LinearSpec, linear_form_named

    count, inputs, outputs = shape
    weight, x = torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(count, inputs)
    flops, ends = 2 * count * inputs * outputs, 4 * count * (inputs + outputs)
    found = []
    for label, (name, options) in LINEAR.items():
        if name == "shiftadd_ptq" and inputs * outputs > SLOW:
            continue
        form = linear_form_named(name, options)
        params = form.convert(weight, None)
        spec = LinearSpec(name, inputs, outputs, False, form.config.to_json())
        packed = {n: t.numpy() for n, t in form.pack(params).items()}

        def make(builder: Any, given: Any, form: Any = form, spec: Any = spec) -> Any:
            kit = LinearKit(builder, target_named("cpu"))
            return form.kernel(kit, spec, {n: v for n, v in given.items() if n != "x"}, given["x"])

        want = x.double() @ form.weight(params).double().T
        moved = ends + sum(t.nbytes for t in packed.values())
        run = compiled(make, {"x": x.numpy(), **packed})
        found.append(_Contender(label, run, want.numpy(), flops, moved))
    want, whole = (x.double() @ weight.double().T).numpy(), ends + 4 * inputs * outputs
    half, narrow = x.bfloat16(), weight.bfloat16()
    linear = torch.nn.functional.linear
    return [
        *found,
        _Contender("our dense fp32", _dense(weight, x), want, flops, whole),
        _Contender("PyTorch fp32", lambda: linear(x, weight), want, flops, whole),
        _Contender("PyTorch bf16", lambda: linear(half, narrow), want, flops, whole // 2),
    ]


def _dense(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """Our product with a float weight that is packed when the model is compiled."""
    import tvm
    from tvm import relax

    from codegen.build import compile_vm
    from codegen.frontend import to_relax
    from codegen.lower import lower

    module = torch.nn.Linear(x.shape[1], len(weight), bias=False)
    module.weight.data.copy_(weight)
    target = target_named("cpu")
    made = lower(to_relax(torch.export.export(module.eval(), (x,)), target), target)
    main = relax.VirtualMachine(compile_vm(made, target), tvm.cpu())["main"]
    given = [tvm.runtime.tensor(a) for a in (x.numpy(), *made.weights.values())]
    out = main(*given)
    return (lambda: main(*given)) if hasattr(out, "numpy") else (lambda: main(*given)[0])


def _sums(shape: tuple[int, int, int, int, int]) -> list[_Contender]:
    """Sums of values under the signs of codes, and the same sums as products of floats."""
    from codegen.kit import Kit

    batch, heads, tokens, width, bits = shape
    codes = [torch.randint(0, 1 << bits, (batch, heads, tokens, 1)) for _ in range(2)]
    signs = [2.0 * ((c >> torch.arange(bits)) & 1) - 1.0 for c in codes]
    v, beta = torch.randn(batch, heads, tokens, width), float(bits + 1)
    fq = torch.cat([signs[0], torch.full_like(signs[0][..., :1], beta)], -1)
    fk = torch.cat([signs[1], torch.ones_like(signs[1][..., :1])], -1)
    wide = fq.double() @ (fk.double().mT @ v.double())
    want = (wide / (fq.double() @ fk.double().sum(-2)[..., None])).numpy()
    words = {n: c.numpy().astype("uint32") for n, c in zip(("cq", "ck"), codes, strict=True)}

    def signed(builder: Any, given: Any) -> Any:
        kit = Kit(builder, target_named("cpu"))
        return kit.hamming_attention(
            given["cq"], given["ck"], given["v"],
            causal=False, bits=bits, beta=beta, own=False, eps=1e-6,
        )  # fmt: skip

    def dense(builder: Any, given: Any) -> Any:
        kit = Kit(builder, target_named("cpu"))
        return kit.linear_attention(given["fq"], given["fk"], given["v"], causal=False, eps=1e-6)

    def eager() -> torch.Tensor:
        return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])

    rows = batch * heads * tokens
    flops, ends = 4 * rows * bits * width, 8 * rows * width
    floats = {"fq": fq.numpy(), "fk": fk.numpy(), "v": v.numpy()}
    moved = ends + 8 * rows * (bits + 1)
    return [
        _Contender(
            "signed sums", compiled(signed, {**words, "v": v.numpy()}), want, flops, ends + 8 * rows
        ),
        _Contender("our dense fp32", compiled(dense, floats), want, flops, moved),
        _Contender("PyTorch fp32", eager, want, flops, moved),
    ]


def compiled(make: Callable[[Any, Any], Any], arrays: Mapping[str, Array]) -> Callable[[], Any]:
    """make(builder, variables by name) scheduled and compiled for this machine, on `arrays`."""
    import tvm
    from tvm import relax, tirx

    from codegen.schedule import schedule

    builder, target = relax.BlockBuilder(), target_named("cpu")
    given = {n: relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in arrays.items()}
    with builder.function("main", list(given.values())):
        with builder.dataflow():
            out = builder.emit_output(make(builder, given))
        builder.emit_func_output(out)
    mod = builder.get()
    for name, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            done = schedule(func, target)
            mod[name] = done.func.with_attr("global_symbol", name.name_hint)
    library = tvm.compile(mod, target=tvm.target.Target(dict(target.tvm)))
    main = relax.VirtualMachine(library, tvm.cpu())["main"]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays.values()]
    return lambda: main(*tensors)


def _timed(shape: str, contenders: list[_Contender], seconds: float) -> list[Row]:
    """Verify every kernel, then run them in turns until the time is over."""
    errors = {}
    for one in contenders:
        out = one.run()
        have = out.float().numpy() if isinstance(out, torch.Tensor) else out.numpy()
        error = float(np.abs(have - one.want).max() / np.abs(one.want).max())
        if not error <= LIMITS.get(one.name, LIMIT):
            raise ValueError(f"{one.name} at {shape} is wrong by {error:.1e}")
        errors[one.name] = error
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[contenders[0].name]) < 5:
        for one in contenders:
            start = time.perf_counter()
            one.run()
            times[one.name].append(1e3 * (time.perf_counter() - start))
    return [
        Row(shape, c.name, min(times[c.name]), statistics.median(times[c.name]), errors[c.name],
            c.flops, c.moved)
        for c in contenders
    ]  # fmt: skip


def _shared(row: Row, peaks: Mapping[str, Any]) -> Row:
    """The row with its shares of the measured limits."""
    seconds = row.median_ms / 1e3
    return Row(
        **{
            **asdict(row),
            "share_of_peak": row.flops / seconds / 1e9 / peaks["gflops"],
            "share_of_bandwidth": row.moved / seconds / 1e9 / peaks["gbytes"],
        }
    )


def page(data: Mapping[str, Any]) -> str:
    """The table as markdown."""
    peaks = data["peaks"]
    made = _ABOVE.format(
        when=data["when"], threads=peaks["threads"], gflops=peaks["gflops"], gbytes=peaks["gbytes"]
    )
    lines = [made]
    rows = data["rows"]
    peer = {r["shape"]: r["median_ms"] for r in rows if r["kernel"] == "PyTorch fp32"}
    lines += [
        f"| {r['shape']} | {r['kernel']} | {r['median_ms']:.3f} | {r['best_ms']:.3f} "
        f"| {peer[r['shape']] / r['median_ms']:.2f} | {r['error']:.0e} "
        f"| {100 * r['share_of_peak']:.0f} % | {100 * r['share_of_bandwidth']:.0f} % |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
