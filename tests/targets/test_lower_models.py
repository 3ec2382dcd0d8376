"""Tiny models, kept exact, through seal, import, lowering and build, against torch."""

import os

import numpy as np
import pytest
import torch

from codegen.build import build
from codegen.target import target_named
from passes.plan import plan_by_rules
from passes.seal import seal
from passes.substitute import substitute
from rewriter.api import find_sites
from tests.targets.lowering import lowered, run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 100, "intermediate_size": 96, "max_position_embeddings": 64}


def _bert():
    from transformers import BertConfig, BertModel

    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 10:] = 0
    return BertModel(BertConfig(**TEXT)), {
        "input_ids": torch.randint(0, 100, (2, 19)),
        "attention_mask": mask,
    }


def _vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SMALL, intermediate_size=96, image_size=32, patch_size=8)
    return ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 100, (1, 17))}


def _llama():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)
    return LlamaModel(config), {"input_ids": torch.randint(0, 100, (1, 17))}


def _t5():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return T5EncoderModel(config), {"input_ids": torch.randint(0, 100, (1, 17))}


def _swin():
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    return SwinModel(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


def _pvt():
    from transformers import PvtV2Config, PvtV2Model

    config = PvtV2Config(
        image_size=64, hidden_sizes=[16, 32, 40, 64], depths=[1] * 4, num_attention_heads=[1] * 4
    )
    return PvtV2Model(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def _whisper():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        num_mel_bins=20,
        max_source_positions=50,
    )
    return WhisperEncoder(config), {"input_features": torch.randn(1, 20, 100)}


MODELS = {f.__name__[1:]: f for f in (_bert, _vit, _gpt2, _llama, _t5, _swin, _pvt, _whisper)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_equals_torch(name):
    model, inputs = MODELS[name]()
    model.eval()
    traced, found = find_sites(model, inputs)
    assert found.sites
    rewritten = substitute(traced, found.sites, plan_by_rules(found.sites, {"*": "exact"}))
    result = lowered(rewritten.module, (), exported=seal(rewritten))
    assert all(k.scheduled_by for k in result.kernels)
    assert not [n for n in result.notes if "rule" in n]
    assert sum(k.count for k in result.kernels if k.scheduled_by == "attention") == len(found.sites)
    for spec in result.inputs:
        if spec.name == "input_ids":
            assert (spec.low, spec.high) == (0, 99)
    got = run(result, tuple(inputs[spec.name] for spec in result.inputs))
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(**inputs))
    wanted = [w for w in wanted if isinstance(w, torch.Tensor)]
    assert len(got) == len(wanted)
    for have, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(have, want.numpy(), atol=1e-4)


def test_a_library_is_built_the_same_twice():
    model, args = torch.nn.Linear(32, 48), (torch.randn(5, 32),)
    result = lowered(model, args)
    first, second = (build(result, target_named("cpu")).code for _ in range(2))
    assert first[:4] == b"\x7fELF"
    assert first == second
    assert len(first) < 200_000
