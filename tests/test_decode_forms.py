"""Token by token equals all at once: the eager recurrences of streaming forms, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from passes.decode_form import BLOCK, Streaming
from passes.errors import InputError
from passes.form import Form, form_named, forms
from passes.site import AttentionSite, Dims, Mask

STREAMING = [name for name, form in forms().items() if issubclass(form, Streaming)]


def site(tokens: int, window: tuple[int, int] | None = None, **dims: int) -> AttentionSite:
    sizes = {"B": 2, "H": 4, "G": 2, "T": tokens, "S": tokens, "D": 6, "E": 5, **dims}
    return AttentionSite("s#0", "n", Dims(**sizes), "float64", 0.3, Mask(True, window=window))


def streaming_form(name: str, **config: Any) -> Streaming:
    form = form_named(name, config)
    assert isinstance(form, Streaming)
    return form


def random_case(form: Form, place: AttentionSite) -> tuple[torch.Tensor, ...]:
    d = place.dims
    shapes = ((d.B, d.H, d.T, d.D), (d.B, d.G, d.T, d.D), (d.B, d.G, d.T, d.E))
    return tuple(torch.randn(*s, dtype=torch.float64) for s in shapes)


def positions(batch: int, first: int, number: int) -> torch.Tensor:
    return (first + torch.arange(number)).expand(batch, number)


def test_the_forms_asked_for_stream() -> None:
    cached = {"exact", "window", "clipped_softmax", "gated", "gaussian", "kv_symmetric", "msa"}
    assert {"elu", "hedgehog", "lolcats", *cached} <= set(STREAMING)


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("cuts", [[1] * 70, [64, 5, 1], [3, 30, 1, 36]], ids=["1", "64", "mixed"])
def test_steps_equal_the_masked_quadratic_form(name: str, cuts: list[int]) -> None:
    assert_steps_are_the_whole(streaming_form(name), cuts)


@pytest.mark.parametrize("window", [1, 5, 16, 35, 40])
@pytest.mark.parametrize("cuts", [[1] * 70, [3, 30, 1, 36]], ids=["1", "mixed"])
def test_a_ring_turns_over_its_blocks(window: int, cuts: list[int]) -> None:
    assert_steps_are_the_whole(streaming_form("lolcats", window=window), cuts)


@pytest.mark.parametrize("name", ["exact", "clipped_softmax", "gated", "gaussian", "window"])
@pytest.mark.parametrize("left", [0, 3, 63, 64, 90])
@pytest.mark.parametrize("cuts", [[1] * 170, [3, 130, 1, 36]], ids=["1", "mixed"])
def test_a_window_is_a_ring(name: str, left: int, cuts: list[int]) -> None:
    form, place = streaming_form(name), site(170, window=(left, 0))
    assert not form.bounded(place)
    assert form.state(place, 10) == form.state(place, 10_000)
    assert_steps_are_the_whole(form, cuts, place)


def test_a_window_of_the_form_needs_one_block_more_than_its_half() -> None:
    values = streaming_form("window", left=BLOCK).state(site(8), 10_000)[1]
    assert values.shape[2] == 2 * BLOCK


def assert_steps_are_the_whole(
    form: Streaming, cuts: list[int], place: AttentionSite | None = None
) -> None:
    place = place or site(70)
    assert form.streams(place)
    q, k, v = random_case(form, place)
    params = {
        n: p.double() + 0.3 * torch.randn(p.shape, dtype=torch.float64) if form.trainable else p
        for n, p in form.init_params(place).items()
    }
    spec = form.spec(place)
    want = form.weights(spec, params, q, k) @ v.repeat_interleave(2, 1)
    if form.name == "norm_linear":  # what it norms, and the norm of that
        want = want * (want.square().mean((1, 3), keepdim=True) + 1e-6).rsqrt()
    state = [s.zeros() for s in form.state(place, sum(cuts))]
    done, first = [], 0
    for number in cuts:
        part = slice(first, first + number)
        out, state = form.step(
            spec, params, q[:, :, part], k[:, :, part], v[:, :, part], state,
            positions(2, first, number),
        )  # fmt: skip
        done.append(out)
        first += number
    torch.testing.assert_close(torch.cat(done, 2), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["elu", "hedgehog", "relu", "taylor", "lolcats"])
def test_the_state_of_a_linear_form_has_one_size(name: str) -> None:
    form = streaming_form(name)
    assert form.state(site(8), 100) == form.state(site(8), 100_000)


def test_a_cache_has_room_for_the_length_in_whole_blocks() -> None:
    keys, values = form_state = streaming_form("exact").state(site(8), BLOCK + 1)
    assert keys.shape == (2, 2, 2, 6, BLOCK)
    assert values.shape == (2, 2, 2 * BLOCK, 5)
    assert all(not s.zeros().any() for s in form_state)


def test_what_lies_behind_the_position_is_not_read() -> None:
    form, place = streaming_form("exact"), site(1)
    q, k, v = random_case(form, place)
    state = [torch.full_like(s.zeros(), torch.nan) for s in form.state(place, 10)]
    out, new = form.step(form.spec(place), {}, q, k, v, state, positions(2, 0, 1))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    assert all(s.isnan().all() for s in state)  # a step does not change what it is given
    assert int((~new[1].isnan()).sum()) == v.numel()


def test_a_full_cache_is_an_error() -> None:
    form, place = streaming_form("exact"), site(1)
    q, k, v = random_case(form, place)
    state = [s.zeros() for s in form.state(place, BLOCK)]
    with pytest.raises(InputError, match="do not fit a buffer for 64"):
        form.step(form.spec(place), {}, q, k, v, state, positions(2, BLOCK, 1))


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (Mask(), "M04"),
        (Mask(causal=True, padding=True), "M05"),
        (Mask(causal=True, bias=True), "M01"),
        (Mask(unknown=True), "M02"),
    ],
)
def test_other_masks_are_refused(mask: Mask, code: str) -> None:
    for name in ("exact", "elu"):
        verdict = streaming_form(name).streams(replace(site(8), mask=mask))
        assert not verdict
        assert verdict.reason == code


def test_sums_forget_nothing_so_a_window_is_refused() -> None:
    place = site(8, window=(3, 0))
    assert streaming_form("elu").streams(place).reason == "M03"
    assert streaming_form("exact").streams(place)
    assert streaming_form("exact").streams(site(8, window=(3, -1))).reason == "M03"


def test_own_values_are_refused() -> None:
    form = streaming_form("hamming", constant="own_value")
    assert "own_value" in str(form.streams(site(8)))


def test_cross_attention_is_refused() -> None:
    assert streaming_form("elu").streams(replace(site(8), cross=True)).reason == "C01"
