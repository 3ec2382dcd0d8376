"""Every model of the zoo gives exactly the sites that its code says, and the same numbers."""

import math

import pytest
import torch

from tests.zoo.check import ENTRIES, as_expected, expected, resized, run, sizes_of
from tests.zoo.table import PATH, committed, head, row

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = [pytest.param(e, a, id=f"{e.name}-{a}") for e in ENTRIES for a in e.attn]
DYNAMIC = [pytest.param(e, a, id=f"{e.name}-{a}") for e in ENTRIES if e.dynamic for a in e.attn]


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: threads only cost
    yield
    torch.set_num_threads(before)


def close(got, want):
    flat_got, flat_want = (torch.utils._pytree.tree_leaves(x) for x in (got, want))
    assert len(flat_got) == len(flat_want)
    for a, b in zip(flat_got, flat_want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_sites(entry, traced, found):
    sizes = sizes_of(traced)
    assert [as_expected(s, sizes) for s in found.sites] == expected(entry)
    for site, want in zip(found.sites, entry.sites, strict=True):
        assert site.dtype == "float32"
        scale = want.scale if want.scale is not None else want.dims[5] ** -0.5
        assert math.isclose(site.scale, scale, rel_tol=1e-6)
        assert site.source
    reasons = [m.reason for m in found.near_misses]
    assert len(reasons) == len(entry.near_misses), reasons
    for reason, part in zip(reasons, entry.near_misses, strict=True):
        assert part in reason


@pytest.mark.parametrize(("entry", "attn"), CASES)
def test_static(entry, attn):
    model, inputs, traced, found = run(entry, attn)
    check_sites(entry, traced, found)
    assert committed()[entry.name, attn] == row(entry, attn, found), "python -m tests.zoo.table"
    assert traced.module.training is model.training
    if entry.exact:
        with torch.no_grad():
            close(traced.module(**inputs), model(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "attn"), DYNAMIC)
def test_dynamic(entry, attn):
    model, inputs, traced, found = run(entry, attn, dynamic=True)
    assert traced.dynamic == entry.dynamic
    check_sites(entry, traced, found)
    with torch.no_grad():
        for given in (inputs, resized(entry, inputs)):
            close(traced.module(**given), model(**given))


def test_table_has_every_model_and_no_other():
    assert PATH.read_text().startswith(head()), "run: python -m tests.zoo.table"
    assert list(committed()) == [(e.name, a) for e in ENTRIES for a in e.attn]
