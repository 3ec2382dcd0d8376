"""hamming_table: the definition by packed words, the table's fit, bad options, its kernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rewriter
from passes.errors import FitError, UsageError
from passes.form import form_named
from passes.forms import _table
from passes.forms.hamming_table import HammingTable
from passes.site import AttentionSite
from tests.by_hand import Encoder, site
from tests.targets.kit_tools import Case, Trial, trial, with_target


def made(case: Case, **options: Any) -> Trial:
    """A trial with these options and any table, away from thresholds."""
    rng = np.random.default_rng()
    form = form_named("hamming_table", options)
    while True:
        arrays = trial("exact", case, rng).arrays
        params = {n: p.numpy() for n, p in form.init_params(case.site).items()}
        params["table"] = rng.normal(size=params["table"].shape, scale=3).astype("float32")
        wide = {n: torch.from_numpy(p).double() for n, p in params.items()}
        t = Trial(form, case, arrays, params)
        q, k = (torch.from_numpy(arrays[n]).double() for n in "qk")
        if form.margin(t.spec, wide, q, k) > 1e-5:
            return t


@pytest.mark.parametrize("bits", [1, 16, 48])
def test_weights_by_the_distance_of_packed_words(bits: int) -> None:
    at = site(B=1, H=2, G=1, T=6, S=5, causal=True)
    form = HammingTable({"bits": bits})
    params = {n: p.double() for n, p in form.init_params(at).items()}
    params["table"] = torch.randn(2, bits + 1).double()
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    q, k, v = q.double(), k.double(), v.double()
    got = form.attend(form.spec(at), params, q, k, v)
    packed = [
        [sum(1 << r for r in range(bits) if row[r] > 0) for row in form.codes(x, params)[0, h]]
        for x, h in ((q, 0), (q, 1), (k, 0))
    ]
    for h in range(2):
        for i in range(6):
            top, bottom = torch.zeros(8).double(), 0.0
            for j in range(min(i, 5)):  # S - T is -1
                distance = (packed[h][i] ^ packed[2][j]).bit_count()
                weight = float(params["table"][h, distance].exp())
                top, bottom = top + weight * v[0, 0, j], bottom + weight
            torch.testing.assert_close(got[0, h, i], top / bottom if bottom else top)


def test_the_first_table_is_an_exponential_and_the_lowest_weight_is_held() -> None:
    at = site(H=2, G=2, D=16)
    table = HammingTable({"bits": 8}).init_params(at)["table"]
    step = at.scale * 16 / 8
    torch.testing.assert_close(table[0].exp(), (-2 * step * torch.arange(9)).exp())
    count = torch.tensor([[[[0.0, 1.0]]]])
    weights = _table.looked_up(torch.tensor([[0.0, -1000.0]]), count)
    torch.testing.assert_close(weights, torch.tensor([[[[1.0, math.exp(_table.LOWEST)]]]]))


def samples(at: AttentionSite, count: int = 3) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Queries and keys that look for each other, as those of a trained model."""
    d, found = at.dims, []
    centres = torch.randn(d.G, 5, d.D)
    for _ in range(count):
        rows = []
        for heads, tokens in ((d.H, d.T), (d.G, d.S)):
            which = torch.randint(5, (int(d.B), heads, int(tokens)))
            group = torch.arange(heads)[None, :, None] // (heads // d.G)
            rows.append(centres[group, which] + 0.4 * torch.randn(*which.shape, d.D))
        mask = torch.rand(int(d.B), int(d.S)) > 0.2 if at.mask.padding else None
        found.append((rows[0] * 1.5, rows[1], mask))
    return found


def likelihood(form: HammingTable, at: AttentionSite, params: Any, data: Any) -> float:
    """Mean cross entropy of the softmax weights under the form's."""
    exact, total = form_named("exact"), []
    for q, k, mask in data:
        want = exact.weights(exact.spec(at), {}, q, k, mask)
        have = form.weights(form.spec(at), params, q, k, mask)
        total.append(float(-(want * have.clamp_min(1e-30).log()).sum(-1).mean()))
    return sum(total) / len(total)


@pytest.mark.parametrize("mask", [{}, {"causal": True, "padding": True}], ids=str)
@pytest.mark.parametrize("quantiser", ["hash", "sign"])
def test_the_fitted_table_is_the_most_likely(quantiser: str, mask: dict[str, Any]) -> None:
    at = site(B=2, H=4, G=2, T=24, S=24, **mask)
    form = HammingTable({"quantiser": quantiser, "bits": 8, "anchors": 9})
    data = samples(at)
    fresh = form.init_params(at)
    found = form.learn(at, fresh, data)
    best = likelihood(form, at, found, data)
    assert best < likelihood(form, at, {**found, "table": fresh["table"]}, data)
    for _ in range(5):
        other = found["table"] + 0.2 * torch.randn_like(found["table"])
        assert best < likelihood(form, at, {**found, "table": other}, data) + 1e-4


def test_calibration_data_without_a_visible_key_is_refused() -> None:
    at = site(B=1, T=4, S=4, padding=True)
    form = HammingTable({"quantiser": "sign"})
    q, k, _ = samples(at, 1)[0]
    with pytest.raises(FitError, match="no query that sees a key"):
        form.learn(at, form.init_params(at), [(q[:1], k[:1], torch.zeros(1, 4, dtype=torch.bool))])


@pytest.mark.parametrize(
    ("options", "told"),
    [({"bits": 0}, "bits"), ({"bits": 65}, "bits"), ({"bits": 8.0}, "bits"),
     ({"anchors": 0}, "anchors"), ({"quantiser": "plane"}, "hash or sign")],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        HammingTable(options)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(T=300, S=300, D=24, E=40), {"bits": 15}),  # a table of one register
        (Case(B=2, T=21, S=70, H=6, G=2, key_rows=2), {"bits": 31}),
        (Case(T=150, S=400, causal=True, H=4, G=2, key_rows=1), {"bits": 32}),  # 33 entries
        (Case(T=37, S=5, causal=True), {"bits": 33}),  # two words
        (Case(T=9, S=140), {"bits": 64}),
        (Case(T=24, S=24, D=48, dtype="float16"), {"quantiser": "sign"}),
        (Case(B=2, T=19, S=19, D=20, H=4, G=1, key_rows=1), {"quantiser": "sign"}),
    ],
    ids=str,
)
def test_kernels_equal_the_module_and_are_counted(case: Case, options: dict[str, Any]) -> None:
    t = made(case, **options)
    if case.key_rows == 1 and case.B > 1:  # a mask for the whole batch
        t.arrays["key_mask"] = t.arrays["key_mask"][:1]
    tolerance = 2e-3 if case.dtype == "float16" else 2e-5
    built, want = t.build(), t.reference()
    np.testing.assert_allclose(t.run(built), want, atol=tolerance, rtol=tolerance)
    assert dict(built.ops.ops) == dict(t.form.ops(case.site).ops)
    narrow = with_target(t, vector_bytes=16, features=())
    np.testing.assert_allclose(narrow.run(), want, atol=tolerance, rtol=tolerance)


def test_nothing_of_a_hidden_key_gets_through() -> None:
    t = made(Case(B=2, T=20, S=37, key_rows=2), bits=16)
    want = t.reference()
    hidden = ~t.arrays["key_mask"]
    for tensor in "kv":
        t.arrays[tensor].transpose(0, 2, 1, 3)[hidden] = np.nan
    np.testing.assert_allclose(t.run(), want, atol=2e-5, rtol=0)


def test_the_look_up_is_a_permutation_of_registers() -> None:
    """One popcount and one permutation for a vector of pairs; no load by index, no exponential."""
    t = made(Case(T=64, S=64), bits=16)
    if "avx512f" not in t.target.features:
        pytest.skip("the permutations are AVX-512's")
    built = t.build()
    code = str(built.scheduled["table_attention"])
    assert code.count("vpermi2var") + code.count("call_llvm_pure_intrin") >= 1
    assert "popcount" in code


def test_a_model_is_fitted_and_compiled(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 9, 16)}
    model = Encoder(groups=2).eval()
    data = [{"x": torch.randn(2, 9, 16)} for _ in range(8)]
    result = rewriter.rewrite(model, inputs, form="hamming_table", fit_seconds=2, data=data)
    fresh = rewriter.rewrite(model, inputs, form="hamming_table")
    name = result.rewritten.sites[0].id
    tables = [r.rewritten.attention(name).params["table"] for r in (result, fresh)]
    assert not torch.equal(*tables)
    artifact = rewriter.compile(result, path=tmp_path / "m.rwa")
    (out,) = artifact(inputs["x"].numpy()).values()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.as_tensor(out), result.model(**inputs), rtol=1e-4, atol=1e-4
        )
