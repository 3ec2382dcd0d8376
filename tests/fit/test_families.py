"""The whole recipe on models of other families: a causal decoder and an image encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.substitute import substitute
from rewriter.api import find_sites, make_plan
from rewriter.fit import Recipe, fit

RECIPE = Recipe(site_steps=20, block_steps=40, end_steps=20)


def gpt2() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=4))
    return model, [{"input_ids": torch.randint(50, (4, 24))} for _ in range(11)]


def vit() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    return model, [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(11)]


@pytest.mark.parametrize("family", [gpt2, vit])
def test_the_recipe_serves_other_families(family: Any) -> None:
    model, data = family()
    with torch.no_grad():  # attention far from uniform, as a trained model has it
        for name, param in model.named_parameters():
            if param.ndim == 2 and any(part in name for part in ("c_attn", "query", "key")):
                param.mul_(8.0)
    traced, found = find_sites(model.eval(), data[0])
    assert len(found.sites) == 2
    made = substitute(traced, found.sites, make_plan(found, form="hedgehog"))
    report = fit(made, data[:8], seconds=600.0, held_out=data[8:], recipe=RECIPE)
    assert [s.name for s in report.stages] == ["sites", "sites", "blocks", "end to end"]
    assert report.fidelity.relative_error < 0.8 * report.fidelity_before.relative_error
