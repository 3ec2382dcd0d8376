"""What every form must hold, whoever wrote it: this runs over all forms that discovery finds."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import passes.form
from passes.errors import UnknownName, UsageError
from passes.form import Form, FormSpec, Reason, Verdict, form_named, forms
from passes.forms.elu import Elu
from passes.plan import plan_by_rules
from passes.seal import is_form_op, seal
from passes.site import AttentionSite, Dims, Mask
from passes.substitute import substitute
from tests.by_hand import Encoder, canonical, site

ALL = sorted(forms())
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "padding": {"padding": True},
    "causal+padding": {"causal": True, "padding": True},
    "window": {"window": (2, 1)},
    "bias": {"bias": True},
    "unknown": {"unknown": True},
}
# Forms that are softmax itself up to some length get options that make them approximate here.
OPTIONS: dict[str, dict[str, Any]] = {"lolcats": {"window": 4}}
# Signed features lose digits in rows of small weights; their tolerance in float32 is wider.
NOISY = {"rebased": 20.0}
LENGTHS = [(1, 1), (7, 7), (1, 9), (9, 4), (65, 65), (67, 131)]


class Case:
    """A form at a site with random tensors; skips if the form refuses the site."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, **facts: Any) -> None:
        self.form = form_named(name, OPTIONS.get(name))
        dtype_name = str(dtype).removeprefix("torch.")
        self.site = site(dtype=dtype_name, **facts)
        verdict = self.form.applies(self.site)
        if not verdict:
            pytest.skip(f"refused: {verdict}")
        d, mask = self.site.dims, self.site.mask
        self.q = torch.randn(d.B, d.H, d.T, d.D, dtype=dtype)
        self.k = torch.randn(d.B, d.G, d.S, d.D, dtype=dtype)
        self.v = torch.randn(d.B, d.G, d.S, d.E, dtype=dtype)
        self.spec = self.form.spec(self.site)
        self.params = {
            key: (p + 0.2 * torch.randn_like(p)).to(torch.float64 if dtype == torch.float64 else p)
            for key, p in self.form.init_params(self.site).items()
        }
        self.key_mask = random_key_mask(d) if mask.padding else None
        tensor = mask.bias or mask.unknown
        self.bias = torch.randn(1, d.H, d.T, d.S, dtype=dtype) if tensor else None

    def attend(self, **swap: Any) -> Tensor:
        t = {"q": self.q, "k": self.k, "v": self.v, "key_mask": self.key_mask, "bias": self.bias}
        return self.form.attend(self.spec, swap.pop("params", self.params), **{**t, **swap})

    def weights(self) -> Tensor:
        return self.form.weights(self.spec, self.params, self.q, self.k, self.key_mask, self.bias)

    def seen(self) -> Tensor:
        """[B, T] bool: queries that see at least one key."""
        d = self.site.dims
        row, column = torch.arange(d.T)[:, None] + d.S - d.T, torch.arange(d.S)[None]
        pairs = torch.ones(d.B, d.T, d.S, dtype=torch.bool)
        if self.site.mask.causal:
            pairs &= column <= row
        if self.site.mask.window is not None:
            left, right = self.site.mask.window
            pairs &= (column >= row - left) & (column <= row + right)
        if self.key_mask is not None:
            pairs &= self.key_mask[:, None]
        return pairs.any(-1)


def random_key_mask(d: Dims) -> Tensor:
    """Padding at the end for the first row, at the start for the others; a key is always seen."""
    mask = torch.ones(int(d.B), int(d.S), dtype=torch.bool)
    hidden = int(d.S) // 3
    mask[0, int(d.S) - hidden :] = False
    mask[1:, :hidden] = False
    return mask


def taken(*masks: str) -> pytest.MarkDecorator:
    """All pairs of a form and a mask that it takes."""
    pairs = [
        (name, mask)
        for name in ALL
        for mask in masks or MASKS
        if form_named(name).applies(site(**MASKS[mask]))
    ]
    return pytest.mark.parametrize(("name", "mask"), pairs)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slow on threads that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every = pytest.mark.parametrize("name", ALL)


def test_the_built_in_forms_are_found() -> None:
    assert {"exact", "elu", "hedgehog"} <= set(ALL)


@every
def test_config_round_trip_and_unknown_option(name: str) -> None:
    form = form_named(name)
    data = json.loads(json.dumps(form.config.to_json()))
    assert form_named(name, data).config == form.config
    with pytest.raises(UnknownName, match="no_such_option"):
        form_named(name, {"no_such_option": 1})


@every
def test_spec_round_trip(name: str) -> None:
    form = form_named(name)
    spec = form.spec(site(causal=True, window=(3, 0)))
    again = FormSpec.loads(spec.dumps())
    assert again == spec
    assert again.dumps() == spec.dumps()
    assert form_named(spec.form, spec.config).config == form.config


@every
def test_says_what_it_is(name: str) -> None:
    form = forms()[name]
    assert form.paper.authors
    assert form.paper.title
    assert 1990 < form.paper.year < 2100
    assert form.paper.link.startswith("https://")
    assert form.formula
    assert form.family in {"exact", "kernelised", "hashing", "sparse", "low-rank"}
    assert form.needs in {"nothing", "short fit", "training"}
    assert (form.__doc__ or "").strip()


def grid() -> list[AttentionSite]:
    facts = itertools.product([False, True], [False, True], [None, (0, 0), (3, 2)], [False, True],
                              [False, True])  # fmt: skip
    all_masks = [Mask(c, p, w, b, u) for c, p, w, b, u in facts]
    all_dims = [
        Dims(1, 1, 1, 1, 1, 1, 1),
        Dims("batch", 4, 2, "tokens", "keys", 8, 8),
        Dims(2, 4, 3, 5, 5, 8, 8),
        Dims(2, 4, 0, 5, 5, 8, 8),
        Dims(3, 6, 1, 1, 77, 5, 3),
    ]
    dtypes = ["float32", "bfloat16", "float16", "float64", "int64", ""]
    return [
        AttentionSite("a#0", "n", d, t, s, m, cross, dropout)
        for d, t, m in itertools.product(all_dims, dtypes, all_masks)
        for s, cross, dropout in ((1.0, False, 0.0), (0.125, True, 0.1))
    ]


@every
def test_applies_is_total_and_explains_itself(name: str) -> None:
    form = form_named(name)
    taken = 0
    for one in grid():
        verdict = form.applies(one)
        assert isinstance(verdict, Verdict)
        taken += bool(verdict)
        if not verdict:
            assert verdict.reason in set(Reason)
            assert len(verdict.detail) > 10
            assert str(verdict).startswith(f"{verdict.reason}: ")
    assert taken > 0


@taken()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shape_dtype_finite_and_near_float64(name: str, mask: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype, T=9, S=9, G=2, E=5, **MASKS[mask])
    out = case.attend()
    assert out.shape == (2, 4, 9, 5)
    assert out.dtype == dtype
    assert out.isfinite().all()
    wide = {k: getattr(case, k).double() for k in ("q", "k", "v")}
    bias = None if case.bias is None else case.bias.double()
    params = {k: p.double() for k, p in case.params.items()}
    reference = case.attend(**wide, bias=bias, params=params)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    tolerance *= NOISY.get(name, 1.0) if dtype == torch.float32 else 1.0
    torch.testing.assert_close(out.double(), reference, rtol=tolerance, atol=tolerance)


@taken()
def test_gradients(name: str, mask: str) -> None:
    case = Case(name, B=1, H=2, G=1, T=3, S=3, D=3, E=2, **MASKS[mask])
    if forms()[name].straight_through:
        check_straight_through(case)
        return
    keys = sorted(case.params)
    tensors = [
        t.requires_grad_() for t in (case.q, case.k, case.v, *(case.params[k] for k in keys))
    ]

    def run(q: Tensor, k: Tensor, v: Tensor, *params: Tensor) -> Tensor:
        return case.attend(q=q, k=k, v=v, params=dict(zip(keys, params, strict=True)))

    assert torch.autograd.gradcheck(run, tensors)


def check_straight_through(case: Case) -> None:
    """Exact gradients of the values; made-up ones that reach q and k and are finite."""
    assert torch.autograd.gradcheck(lambda v: case.attend(v=v), [case.v.requires_grad_()])
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    case.attend(q=q, k=k).square().sum().backward()
    for x in (q, k):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert max(float(x.grad.abs().max()) for x in (q, k) if x.grad is not None) > 0


@taken("causal", "causal+padding")
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (5, 9)])
def test_no_leak_from_future_tokens(name: str, mask: str, queries: int, keys: int) -> None:
    case = Case(name, T=queries, S=keys, D=4, **MASKS[mask])
    before = case.attend()
    at = queries // 2
    later = slice(at + 1 + keys - queries, None)
    k, v = case.k.clone(), case.v.clone()
    k[:, :, later] = 9 * torch.randn_like(k[:, :, later])
    v[:, :, later] = 9 * torch.randn_like(v[:, :, later])
    after = case.attend(k=k, v=v)
    torch.testing.assert_close(after[:, :, : at + 1], before[:, :, : at + 1], rtol=0, atol=1e-13)
    assert (after[:, :, at + 1 :] - before[:, :, at + 1 :]).abs().max() > 1e-3
    k.requires_grad_()
    case.attend(k=k)[:, :, : at + 1].sum().backward()
    assert k.grad is not None
    assert k.grad[:, :, later].abs().max() == 0


@taken("padding", "causal+padding")
def test_values_at_masked_keys_do_not_matter(name: str, mask: str) -> None:
    case = Case(name, T=11, S=11, G=2, **MASKS[mask])
    assert case.key_mask is not None
    hidden = ~case.key_mask[:, None, :, None]
    for size in (10.0, 1e20):
        k = torch.where(hidden, size * torch.randn_like(case.k), case.k)
        v = torch.where(hidden, size * torch.randn_like(case.v), case.v)
        torch.testing.assert_close(case.attend(k=k, v=v), case.attend(), rtol=1e-12, atol=1e-12)


@every
def test_masked_keys_could_as_well_be_absent(name: str) -> None:
    case = Case(name, B=1, T=6, S=9, padding=True)
    kept = 6
    short = Case(name, B=1, T=6, S=kept)
    out = short.attend(q=case.q, k=case.k[:, :, :kept], v=case.v[:, :, :kept], params=case.params)
    torch.testing.assert_close(case.attend(), out, rtol=1e-12, atol=1e-12)


@taken("padding", "causal+padding")
def test_a_query_that_sees_no_key_gives_zero(name: str, mask: str) -> None:
    case = Case(name, T=5, S=5, **MASKS[mask])
    key_mask = torch.ones(2, 5, dtype=torch.bool)
    key_mask[1] = False
    case.q.requires_grad_()
    out = case.attend(key_mask=key_mask)
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()
    out.square().sum().backward()
    assert case.q.grad is not None
    assert case.q.grad.isfinite().all()


@taken()
def test_batch_and_head_equivariance(name: str, mask: str) -> None:
    case = Case(name, B=3, H=6, G=3, T=5, S=5, **MASKS[mask])
    out = case.attend()
    batch = torch.tensor([2, 0, 1])
    swapped = {key: getattr(case, key)[batch] for key in ("q", "k", "v")}
    key_mask = None if case.key_mask is None else case.key_mask[batch]
    moved = case.attend(**swapped, key_mask=key_mask)
    torch.testing.assert_close(moved, out[batch], rtol=1e-12, atol=1e-12)
    groups = torch.tensor([1, 2, 0])
    heads = (groups[:, None] * 2 + torch.arange(2)).flatten()
    order = {6: heads, 3: groups}
    moved = case.attend(
        q=case.q[:, heads],
        k=case.k[:, groups],
        v=case.v[:, groups],
        bias=None if case.bias is None else case.bias[:, heads],
        params={key: p[order[p.shape[0]]] for key, p in case.params.items()},
    )
    torch.testing.assert_close(moved, out[:, heads], rtol=1e-12, atol=1e-12)


@taken()
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_weights_of_all_lengths(name: str, mask: str, queries: int, keys: int) -> None:
    case = Case(name, T=queries, S=keys, G=2, D=6, E=3, **MASKS[mask])
    weights, seen = case.weights(), case.seen()
    assert weights.shape == (2, 4, queries, keys)
    rows = seen[:, None].expand(2, 4, queries).double()
    if not case.form.normalised:
        assert ((weights != 0).any(-1) == rows.bool()).all()
        return
    if case.form.local:  # what it sees may be hidden where other keys are not
        rows = rows * (weights != 0).any(-1)
    torch.testing.assert_close(weights.sum(-1), rows, rtol=1e-10, atol=1e-10)
    if not case.form.weighted:
        return
    values = case.v.repeat_interleave(2, 1)
    torch.testing.assert_close(weights @ values, case.attend(), rtol=1e-10, atol=1e-10)


@taken("padding", "causal+padding")
def test_one_key_mask_serves_the_whole_batch(name: str, mask: str) -> None:
    case = Case(name, T=6, S=6, **MASKS[mask])
    one = torch.tensor([[True, True, False, True, True, False]])
    out = case.attend(key_mask=one)
    torch.testing.assert_close(out, case.attend(key_mask=one.expand(2, 6)))


@taken("none", "causal")
def test_a_short_fit_lowers_the_error(name: str, mask: str) -> None:
    if not forms()[name].trainable:
        pytest.skip("not trainable")
    case = Case(name, torch.float32, T=32, S=32, D=8, **MASKS[mask])
    case.q *= 2.0
    teacher = form_named("exact")
    target = teacher.attend(teacher.spec(case.site), {}, case.q, case.k, case.v)
    params = {key: torch.nn.Parameter(p) for key, p in case.form.init_params(case.site).items()}
    optimiser = torch.optim.Adam(params.values(), lr=1e-2)
    errors: list[float] = []
    while len(errors) < 400 and not (errors and errors[-1] < 0.9 * errors[0]):
        error = (case.attend(params=params) - target).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]


@every
def test_param_names_are_those_of_init_params(name: str) -> None:
    form = form_named(name)
    params = form.init_params(site(H=6, G=3, D=8))
    assert form.param_names() == tuple(sorted(params))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in params.values())


@every
def test_sealed_graph_and_state_dict_round_trip(name: str) -> None:
    model = Encoder(groups=2).eval()
    x, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    traced, sites = canonical(model, {"x": x, "mask": mask}, Mask(padding=True))
    if not form_named(name).applies(sites[0]):
        pytest.skip("refused")
    rewritten = substitute(traced, sites, plan_by_rules(sites, {"*": name}))
    with torch.no_grad():
        for key, p in rewritten.module.named_parameters():
            if ".params." in key:
                p += 0.1 * torch.randn_like(p)
    sealed = seal(rewritten)
    assert sum(is_form_op(n.target) for n in sealed.graph.nodes) == 2
    want = rewritten.module(x=x, mask=mask)
    torch.testing.assert_close(sealed.module()(x=x, mask=mask), want, rtol=1e-6, atol=1e-6)
    fresh = substitute(traced, sites, rewritten.plan)
    fresh.module.load_state_dict(copy.deepcopy(rewritten.module.state_dict()))
    torch.testing.assert_close(fresh.module(x=x, mask=mask), want, rtol=0, atol=0)


class Point:
    """An entry point."""

    def __init__(self, load: Callable[[], type[Form]]) -> None:
        self.load = load


class Foreign(Elu):
    """A third party's form."""

    name: ClassVar[str] = "foreign"


class Clash(Elu):
    """Takes a name that exists."""


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    points: list[Point] = []
    monkeypatch.setattr(passes.form, "_CACHE", {})
    found = lambda group: points if group == "attention_rewriter.forms" else []  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "entry_points", found)
    return points


def test_third_parties_register_by_entry_point(entry_points: list[Point]) -> None:
    entry_points.append(Point(lambda: Foreign))
    assert isinstance(form_named("foreign"), Foreign)
    assert set(forms()) == {*ALL, "foreign"}


def test_a_name_clash_is_an_error_every_time(entry_points: list[Point]) -> None:
    entry_points.append(Point(lambda: Clash))
    for _ in range(2):
        with pytest.raises(UsageError, match=re.escape("two forms are called 'elu'")):
            forms()


def test_an_unknown_form_suggests_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean hedgehog"):
        form_named("hedgehg")
