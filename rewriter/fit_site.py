"""Fitting one site: its form's parameters, against the softmax attention that stood there."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.form import Form
from passes.forms.exact import Exact
from passes.substitute import AttentionModule, Rewritten
from rewriter.capture import Call, capture
from rewriter.fit_loop import Task, shuffled
from rewriter.fit_loss import divergence, head_divergences, output_error, row_mask
from rewriter.fit_report import Recipe
from rewriter.linears import Linear, output_projection
from rewriter.ridge import Refit, refit

HELD_OUT = 4  # one sample in four chooses the penalty of a refit
REFRESH_BYTES = 1 << 28  # of queries, keys and values held by a refresh
MEASURED = 4  # calls of a site that decide and measure
LONGEST = 2048  # tokens of a sequence whose attention weights are formed


def few(calls: Sequence[Call], tokens: int) -> list[Call]:
    """At most `MEASURED` of the calls, evenly over all lengths, each cut to about 2 `tokens`."""
    step = max(1, len(calls) // MEASURED)
    return [_cut(c, 0, 2 * tokens) for c in calls[step // 2 :: step][:MEASURED]]


def _cut(call: Call, start: int, tokens: int) -> Call:
    samples = max(1, tokens // max(call.q.shape[2], call.k.shape[2]))
    return call.rows(start, start + samples)


@torch.no_grad()
def shortened(attention: AttentionModule, call: Call, start: int = 0) -> Call:
    """The call for `LONGEST` tokens from `start` on, with the softmax output of those alone.

    Keeps the weights formed for a long sequence bounded. Only where queries and keys are the same
    tokens and the form has no length of its own; otherwise, or if short already, the call itself.
    """
    queries, keys = call.q.shape[2], call.k.shape[2]
    plain = attention.form.family == "kernelised" and call.bias is None
    if queries != keys or attention.site.cross or not plain or queries <= LONGEST:
        return call
    cut = slice(start, start + LONGEST)
    q, k, v = (x[:, :, cut] for x in (call.q, call.k, call.v))
    mask = None if call.key_mask is None else call.key_mask[:, cut]
    return Call(q, k, v, mask, None, Exact().attend(attention.spec, {}, q, k, v, mask))


@torch.no_grad()
def measure(attention: AttentionModule, calls: Sequence[Call]) -> tuple[float, float]:
    """(relative error of the attention output, KL divergence of the weights), means over calls."""
    errors = [float(output_error(attention, c)) for c in calls]
    gaps = [float(divergence(attention, c)) for c in calls]
    return (sum(errors) / len(errors)) ** 0.5, sum(gaps) / len(gaps)


@torch.no_grad()
def choose_scale(
    attention: AttentionModule, calls: Sequence[Call], scales: Sequence[float]
) -> Tensor:
    """Multiply the form's fresh parameters by those of `scales` with the least divergence.

    A scale for each key/value head where all parameters are by head (their first axis is H or G)
    and that is better than one scale for all; returns the choice, [G].
    """
    fresh = {n: p.detach().clone() for n, p in attention.params.items()}
    groups = attention.site.dims.G
    found: list[tuple[Tensor, float]] = []
    for scale in scales:
        _set(attention, fresh, torch.full((groups,), scale))
        gaps = _head_gaps(attention, calls)
        if bool(torch.isfinite(gaps).all()):
            found.append((gaps, scale))
    if not found:
        _set(attention, fresh, torch.ones(groups))
        return torch.ones(groups)
    least, single = min((float(gaps.sum()), scale) for gaps, scale in found)
    chosen = torch.full((groups,), single)
    if all(p.ndim and p.shape[0] in (groups, attention.site.dims.H) for p in fresh.values()):
        by_group = torch.stack([gaps.reshape(groups, -1).sum(1) for gaps, _ in found])
        each = torch.tensor([scale for _, scale in found])[by_group.argmin(0)]
        _set(attention, fresh, each)
        if float(_head_gaps(attention, calls).sum()) < least:
            return each
    _set(attention, fresh, chosen)
    return chosen


def _head_gaps(attention: AttentionModule, calls: Sequence[Call]) -> Tensor:
    """Summed divergence of each head over the calls: [H]."""
    return torch.stack([head_divergences(attention, c) for c in calls]).sum(0)


@torch.no_grad()
def learn_site(
    attention: AttentionModule, calls: Sequence[Call], seed: int, *, warm: bool = False
) -> list[str]:
    """Let the form learn what it takes from queries and keys; names of the changed parameters."""
    samples = [(c.q, c.k, c.key_mask) for c in calls]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: see fit.py
    try:
        params = dict(attention.params.items())
        found = attention.form.learn(attention.site, params, samples, seed=seed, warm=warm)
    finally:
        torch.set_num_threads(threads)
    for name, value in found.items():
        attention.params[name].copy_(value)
    return list(found)


@torch.no_grad()
def refresh(
    rewritten: Rewritten, batches: Sequence[Mapping[str, Tensor]], *, seed: int = 0
) -> list[str]:
    """Learn the hashes anew from the rewritten model's own activations, starting from the old.

    For fine-tuning: every few epochs, as the projections before a hash have changed. Returns the
    ids of the sites that have something to learn.
    """
    sites = [s.id for s in rewritten.sites if _learns(rewritten.attention(s.id))]
    calls = capture(rewritten, batches, sites, REFRESH_BYTES) if sites else {}
    return [s for s in sites if learn_site(rewritten.attention(s), calls[s], seed, warm=True)]


def _learns(attention: AttentionModule) -> bool:
    return type(attention.form).learn is not Form.learn


def _set(attention: AttentionModule, values: dict[str, Tensor], scales: Tensor) -> None:
    """Parameters as `values` times `scales` [G]: by head, or the one scale where all are equal."""
    for name, param in attention.params.items():
        factor: Tensor | float = float(scales[0])
        if bool((scales != scales[0]).any()):
            each = scales.repeat_interleave(len(param) // len(scales))
            factor = each.reshape(-1, *[1] * (param.ndim - 1)).to(param)
        param.copy_(values[name] * factor)


def site_task(
    rewritten: Rewritten,
    site: str,
    calls: Sequence[Call],
    recipe: Recipe,
    seconds: float,
    seed: int,
    prefix: str,
) -> Task:
    """Attention weights first, then outputs, on the original's own q, k and v."""
    attention = rewritten.attention(site)
    held, used = split(calls)
    test = [shortened(attention, c) for c in few(held, recipe.tokens)]
    name = f"site {site}"
    steps = recipe.site_steps

    def loss(step: int, done: float) -> Tensor:
        call = _draw(used, step, recipe.tokens, seed, name)
        spare = max(0, call.q.shape[2] - LONGEST)
        call = shortened(attention, call, random.Random(f"{seed} {name} {step}").randint(0, spare))
        return divergence(attention, call) if done < 0.5 else output_error(attention, call)

    def validate() -> float:
        error, gap = measure(attention, test)
        return error**2 + 0.25 * gap

    params = {f"{prefix}{n}": p for n, p in attention.params.items() if p.requires_grad}
    rates = dict.fromkeys(params, recipe.site_lr)
    return Task(name, "sites", site, params, rates, loss, validate, seconds, steps)


def sequential_task(
    rewritten: Rewritten,
    site: str,
    calls: Sequence[Call],
    recipe: Recipe,
    seconds: float,
    seed: int,
    prefix: str,
) -> Task:
    """Outputs only: q, k and v of the rewritten model so far, the original's attention output."""
    attention = rewritten.attention(site)
    held, used = split(calls)
    test = few(held, recipe.tokens)
    name = f"sequential {site}"

    def loss(step: int, done: float) -> Tensor:
        return output_error(attention, _draw(used, step, recipe.tokens, seed, name))

    @torch.no_grad()
    def validate() -> float:
        return sum(float(output_error(attention, c)) for c in test) / len(test)

    params = {f"{prefix}{n}": p for n, p in attention.params.items() if p.requires_grad}
    rates = dict.fromkeys(params, recipe.site_lr / 4)
    steps = recipe.site_steps
    return Task(name, "sequential", site, params, rates, loss, validate, seconds, steps)


def split(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """(to measure, to train): every eighth call measures; the same ones where there are few."""
    if len(calls) < 8:
        return list(calls), list(calls)
    return list(calls[4::8]), [c for i, c in enumerate(calls) if i % 8 != 4]


def _draw(calls: Sequence[Call], step: int, tokens: int, seed: int, name: str) -> Call:
    call = calls[shuffled(step, len(calls), seed, name)]
    samples = max(1, tokens // max(call.q.shape[2], call.k.shape[2]))
    spare = len(call.q) - samples
    start = random.Random(f"{seed} {name} rows {step}").randint(0, spare) if spare > 0 else 0
    return call.rows(start, start + samples)


@torch.no_grad()
def refit_projection(
    rewritten: Rewritten, site: str, calls: Sequence[Call]
) -> tuple[Refit | None, list[str], str]:
    """Closed-form refit of the layer after a site, in place.

    `calls` hold the rewritten model's own q, k, v and, as `out`, the original's attention output.
    Returns (what was done, names of the parameters changed, why nothing was done).
    """
    linear, why = output_projection(rewritten, site)
    if linear is None:
        return None, [], why
    attention = rewritten.attention(site)
    weight, bias = _values(rewritten, linear)
    rows: list[tuple[bool, Tensor, Tensor]] = []
    for call in calls:
        keep = row_mask(attention, call)[:, 0, :, 0].bool().expand(call.q.shape[0], -1)
        got = attention(call.q, call.k, call.v, call.key_mask, call.bias)
        x, y = _rows(got), F.linear(_rows(call.out), weight, bias)
        rows += [(i % HELD_OUT == HELD_OUT - 1, x[i][k], y[i][k]) for i, k in enumerate(keep)]
    # Rows of one sample are alike, so whole samples are held out, not rows.
    rows.sort(key=lambda row: row[0])
    last = sum(len(x) for held, x, _ in rows if held)
    x, y = torch.cat([x for _, x, _ in rows]), torch.cat([y for _, _, y in rows])
    done = refit(x, y, weight, bias, last / len(x) if last else 0.2)
    if done.penalty == 0:
        return done, [], "no penalty did better than the old weights"
    _assign(rewritten, linear, done)
    return done, linear.names, ""


def _rows(heads: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H * E]."""
    return heads.transpose(1, 2).flatten(2)


def _values(rewritten: Rewritten, linear: Linear) -> tuple[Tensor, Tensor | None]:
    state = dict(rewritten.module.named_parameters(remove_duplicate=False))
    weight = state[linear.weight].detach()
    bias = None if linear.bias is None else state[linear.bias].detach()
    return (weight.T if linear.transposed else weight), bias


def _assign(rewritten: Rewritten, linear: Linear, done: Refit) -> None:
    state = dict(rewritten.module.named_parameters(remove_duplicate=False))
    state[linear.weight].copy_(done.weight.T if linear.transposed else done.weight)
    if linear.bias is not None and done.bias is not None:
        state[linear.bias].copy_(done.bias)


def paired(mine: Sequence[Call], theirs: Sequence[Call]) -> list[Call]:
    """The rewritten model's inputs with the original's outputs, by batch."""
    return [
        Call(a.q, a.k, a.v, a.key_mask, a.bias, b.out[: len(a.q)])
        for a, b in zip(mine, theirs, strict=False)
    ]
