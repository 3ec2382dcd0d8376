"""torch.nn's own attention: TransformerEncoder, TransformerDecoder, MultiheadAttention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry, Made, Site, sites
from tests.zoo.text import B, D, H

T, S = 12, 9
WIDTH = H * D
RESIZE = {"batch": 3, "seq": 7}


class Encoder(nn.TransformerEncoder):
    """nn.TransformerEncoder over (x, key_padding): key_padding True = ignore."""

    def __init__(self, *, batch_first: bool = True, dropout: float = 0.1, causal: bool = False):
        layer = nn.TransformerEncoderLayer(WIDTH, H, 48, dropout=dropout, batch_first=batch_first)
        super().__init__(layer, 2, enable_nested_tensor=False)
        mask = nn.Transformer.generate_square_subsequent_mask(T) if causal else None
        self.register_buffer("causal_mask", mask)

    def forward(self, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        causal = self.causal_mask is not None
        return super().forward(
            x, mask=self.causal_mask, src_key_padding_mask=key_padding, is_causal=causal
        )


class Decoder(nn.TransformerDecoder):
    """nn.TransformerDecoder with a causal target mask, over (x, memory, memory_padding)."""

    def __init__(self) -> None:
        super().__init__(nn.TransformerDecoderLayer(WIDTH, H, 48, batch_first=True), 2)
        self.register_buffer("causal_mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x: Tensor, memory: Tensor, memory_padding: Tensor | None = None) -> Tensor:
        return super().forward(
            x, memory, tgt_mask=self.causal_mask, tgt_is_causal=True,
            memory_key_padding_mask=memory_padding,
        )  # fmt: skip


class Heads(nn.Module):
    """One nn.MultiheadAttention; self attention unless `memory` is given."""

    def __init__(self, *, batch_first: bool, weights: str = "off") -> None:
        super().__init__()
        self.attn, self.weights = nn.MultiheadAttention(WIDTH, H, batch_first=batch_first), weights

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        kv = x if memory is None else memory
        out, probabilities = self.attn(x, kv, kv, need_weights=self.weights != "off")
        return (out, probabilities) if self.weights == "returned" else out


def features(tokens: int = T, *, batch_first: bool = True) -> Tensor:
    return torch.randn(B, tokens, WIDTH) if batch_first else torch.randn(tokens, B, WIDTH)


def ignored(tokens: int = T) -> Tensor:
    mask = torch.zeros(B, tokens, dtype=torch.bool)
    mask[1:, tokens - 3 :] = True
    return mask


def encoder(*, train: bool = False, padded: bool = False, **options) -> Made:
    inputs = {"x": features(batch_first=options.get("batch_first", True))}
    if padded:
        inputs["key_padding"] = ignored()
    return Encoder(**options).train(train), inputs


def decoder(*, padded: bool = False) -> Made:
    inputs = {"x": features(), "memory": features(S)}
    if padded:
        inputs["memory_padding"] = ignored(S)
    return Decoder().eval(), inputs


def heads(*, batch_first: bool, cross: bool = False, weights: str = "off") -> Made:
    inputs = {"x": features(batch_first=batch_first)}
    if cross:
        inputs["memory"] = features(S, batch_first=batch_first)
    return Heads(batch_first=batch_first, weights=weights).eval(), inputs


_SELF = (B, H, H, T, T, D)
_CROSS = (B, H, H, T, S, D)
_SEQ = {0: "batch", 1: "seq"}


def _decoder_sites(mask: str) -> tuple[Site, ...]:
    own = sites("layers.{i}.self_attn", 2, "causal", _SELF)
    cross = sites("layers.{i}.multihead_attn", 2, mask, _CROSS, cross=True)
    return (own[0], cross[0], own[1], cross[1])


def _one(dims: tuple[int, ...], **facts) -> tuple[Site, ...]:
    return sites("attn", 1, "none", dims, **facts)


_TORCH = ("torch",)
ENTRIES = (
    Entry(
        "nn.TransformerEncoder, eval", lambda _: encoder(),
        sites("layers.{i}.self_attn", 2, "none", _SELF), _TORCH, {"x": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.TransformerEncoder, eval, padding", lambda _: encoder(padded=True),
        sites("layers.{i}.self_attn", 2, "padding", _SELF), _TORCH,
        {"x": _SEQ, "key_padding": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.TransformerEncoder, eval, causal", lambda _: encoder(causal=True),
        sites("layers.{i}.self_attn", 2, "causal", _SELF), _TORCH, {"x": {0: "batch"}},
        {"batch": 3},
    ),
    Entry(
        "nn.TransformerEncoder, train", lambda _: encoder(train=True),
        sites("layers.{i}.self_attn", 2, "none", _SELF, dropout=0.1), _TORCH, exact=False,
    ),
    Entry(
        "nn.TransformerEncoder, train, padding", lambda _: encoder(train=True, padded=True),
        sites("layers.{i}.self_attn", 2, "padding", _SELF, dropout=0.1), _TORCH, exact=False,
    ),
    Entry(
        "nn.TransformerEncoder, train without dropout",
        lambda _: encoder(train=True, padded=True, dropout=0.0),
        sites("layers.{i}.self_attn", 2, "padding", _SELF), _TORCH,
    ),
    Entry(
        "nn.TransformerEncoder, sequence first", lambda _: encoder(batch_first=False),
        sites("layers.{i}.self_attn", 2, "none", _SELF), _TORCH,
        {"x": {0: "seq", 1: "batch"}}, RESIZE,
    ),
    Entry(
        "nn.TransformerDecoder", lambda _: decoder(), _decoder_sites("none"), _TORCH,
        {"x": {0: "batch"}, "memory": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.TransformerDecoder, padded memory", lambda _: decoder(padded=True),
        _decoder_sites("padding"), _TORCH,
        {"x": {0: "batch"}, "memory": _SEQ, "memory_padding": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention", lambda _: heads(batch_first=True), _one(_SELF), _TORCH,
        {"x": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention, sequence first", lambda _: heads(batch_first=False), _one(_SELF),
        _TORCH, {"x": {0: "seq", 1: "batch"}}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention, cross", lambda _: heads(batch_first=True, cross=True),
        _one(_CROSS, cross=True), _TORCH, {"x": {0: "batch"}, "memory": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention, cross, sequence first",
        lambda _: heads(batch_first=False, cross=True), _one(_CROSS, cross=True), _TORCH,
        {"x": {1: "batch"}, "memory": {0: "seq", 1: "batch"}}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention, weights made but not used",
        lambda _: heads(batch_first=True, weights="unused"), _one(_SELF), _TORCH,
        {"x": _SEQ}, RESIZE,
    ),
    Entry(
        "nn.MultiheadAttention, weights returned",
        lambda _: heads(batch_first=True, weights="returned"), (), _TORCH,
        {"x": _SEQ}, RESIZE, near_misses=("used elsewhere",),
    ),
)  # fmt: skip
