"""Convolutions channels last: right results, and no transposes left where tokens meet them."""

import pytest
import torch
from torch import nn

from tests.targets.lowering import check


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
