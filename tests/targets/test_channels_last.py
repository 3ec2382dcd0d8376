"""Convolutions channels last: right results, and no transposes left where tokens meet them."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.targets.lowering import check, lowered, run


class _Tokens(nn.Module):
    """Tokens -> image -> convolution -> activation -> tokens, as vision transformers do."""

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        super().__init__()
        self.conv, self.side = conv, side
        self.before = nn.Linear(8, conv.in_channels)
        self.after = nn.Linear(conv.out_channels, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        batch, _, channels = x.shape
        x = x.transpose(1, 2).reshape(batch, channels, self.side, self.side)
        x = nn.functional.gelu(self.conv(x).flatten(2).transpose(1, 2))
        return self.after(x)


@pytest.mark.parametrize(
    ("inner", "out", "options"),
    [
        (48, 48, {"kernel_size": 3, "padding": 1, "groups": 48}),
        (33, 33, {"kernel_size": 3, "padding": 1, "groups": 33}),
        (16, 40, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (16, 32, {"kernel_size": 3, "padding": 2, "dilation": 2}),
        (24, 20, {"kernel_size": 2, "stride": 2}),
        (24, 20, {"kernel_size": 1}),
    ],
)
def test_between_tokens(inner, out, options):
    torch.manual_seed(len(options))
    module = _Tokens(nn.Conv2d(inner, out, **options), side=10)
    result = check(module, torch.randn(2, 100, 8))
    names = [k.name for k in result.kernels]
    moved = [n for n in names if "transpose" in n]
    # Only cutting into patches still moves data.
    assert len(moved) == (1 if options["kernel_size"] == 2 else 0), names
    assert sum("gelu" in n for n in names) == 1
    assert any("gelu" in n and ("conv" in n or "depthwise" in n or "dense" in n) for n in names)


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 7, stride=4, padding=3)
        self.side = nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False)
        self.grouped = nn.Conv2d(20, 40, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.sigmoid(self.side(x)) * 0.5
        return self.grouped(x).mean((2, 3))


def test_chain_with_residual_and_groups():
    torch.manual_seed(3)
    check(_Image(), torch.randn(2, 3, 37, 45))


class _Consumers(nn.Module):
    """The convolution's result is read both as an image and as tokens, and by a row operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        tokens = y.flatten(2).transpose(1, 2)
        return y, torch.softmax(y, -1), tokens @ tokens.transpose(1, 2)


def test_read_in_both_orders():
    torch.manual_seed(4)
    check(_Consumers(), torch.randn(1, 4, 9, 6))


def test_channel_order_is_not_confused_with_square_sizes():
    """C = H = W: a wrong axis order would still fit by shape."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.scale = nn.Parameter(torch.randn(8, 1, 1))
            self.row = nn.Parameter(torch.randn(1, 8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x.transpose(1, 3)) * self.scale + self.row
            return self.b(y.transpose(2, 3)).reshape(1, 8, 64).transpose(1, 2)

    torch.manual_seed(5)
    check(Square(), torch.randn(1, 8, 8, 8))


_CONVOLUTIONS = [
    # channels in and out, (height, width), options of nn.Conv2d
    (3, 40, (23, 30), {"kernel_size": 7, "padding": 3, "stride": 4}),
    (16, 32, (9, 26), {"kernel_size": 3, "padding": 1}),
    (21, 50, (8, 17), {"kernel_size": (5, 3), "padding": (1, 2), "stride": 2}),
    (8, 7, (12, 12), {"kernel_size": 3, "padding": 2, "dilation": (1, 2)}),
    (5, 100, (6, 3), {"kernel_size": (2, 3), "padding": (3, 0)}),
    (4, 16, (7, 40), {"kernel_size": (1, 9)}),
]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("inner", "out", "size", "options"), _CONVOLUTIONS)
def test_convolution_with_what_is_fused_behind_it(inner, out, size, options, tokens):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inner, out, **options)

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv(x.permute(0, 3, 1, 2) if tokens else x))
            return y.permute(0, 2, 3, 1) + other

    module = Residual()
    x = torch.randn(2, inner, *size)
    other = torch.randn_like(module.conv(x).permute(0, 2, 3, 1).contiguous())
    result = check(module, x.permute(0, 2, 3, 1).contiguous() if tokens else x, other)
    assert [k.scheduled_by for k in result.kernels] == ["conv"], result.kernels


_DEPTHWISE = [
    # channels, (height, width), options of nn.Conv2d
    (48, (9, 20), {"kernel_size": 3, "padding": 1}),
    (21, (5, 37), {"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2)}),
    (64, (7, 7), {"kernel_size": 7, "padding": 3}),
    (32, (11, 13), {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2}),
    (16, (4, 3), {"kernel_size": 3, "padding": 4, "dilation": (1, 2)}),  # sums of padding alone
    (40, (6, 17), {"kernel_size": (1, 4), "padding": (0, 1), "stride": (2, 1)}),
    (3, (12, 1), {"kernel_size": (3, 1)}),
]


@pytest.mark.parametrize(("channels", "size", "options"), _DEPTHWISE)
def test_depthwise_with_what_is_fused_behind_it(channels, size, options):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, groups=channels, **options)
            self.scale = nn.Parameter(torch.randn(channels, 1, 1))

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            y = self.conv(x) * self.scale
            return torch.tanh(y) + nn.functional.gelu(y) * other.permute(0, 3, 1, 2)

    module = Gated()
    x = torch.randn(2, channels, *size)
    other = torch.randn_like(module.conv(x).permute(0, 2, 3, 1).contiguous())
    result = check(module, x, other)
    rules = {k.name: k.scheduled_by for k in result.kernels}
    assert [r for n, r in rules.items() if "depthwise" in n] == ["conv"], rules


def test_padding_is_zero_also_beside_infinity():
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    x = torch.randn(1, 16, 6, 10)
    x[:, :, 0, 0], x[:, :, 5, 9] = float("inf"), float("nan")
    result = lowered(conv, (x,))
    (got,) = run(result, (x,))
    np.testing.assert_allclose(got, conv(x).detach().numpy(), atol=1e-5)
    assert np.isfinite(got[0, 0]).sum() == 6 * 10 - 8
