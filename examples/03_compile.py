"""Compile a model into one file and run it with numpy alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rewriter import compile, load


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
    x = torch.randn(1, 48, 64)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.rwa"
        compile(model, (x,), path=path, form="hedgehog")
        artifact = load(path)
        name = artifact.inputs[0].name
        outputs = artifact.run({name: x.numpy()})
        print(f"{path.stat().st_size / 1e6:.2f} MB, inputs {artifact.inputs}")
        for output, array in outputs.items():
            print(output, array.shape, f"mean {np.mean(array):+.4f}")


if __name__ == "__main__":
    main()
