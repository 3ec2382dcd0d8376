"""Models that generate, with rewritten linear layers in both of their functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.decode_seal import seal_step
from passes.errors import ModelError
from passes.linear_seal import is_linear_op
from passes.linears import linear_modules
from rewriter.api import rewrite
from rewriter.decode import compile_decoder
from tests.decode_models import MODELS, VOCABULARY, follows


@pytest.mark.slow  # two functions of a language model are compiled and run
@pytest.mark.parametrize(
    ("name", "form", "linear"),
    [("gpt2", "exact", "shift"), ("llama", "elu", "moe:latencies=1/1,*up_proj")],
)
def test_generated_text_is_that_of_the_rewritten_model(
    name: str, form: str, linear: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    ids = torch.randint(0, VOCABULARY, (1, 64))
    prompt = ids[:, :40]
    result = rewrite(model, {"input_ids": ids}, form=form, linear=linear, on_noop="ok")
    layers = linear_modules(result.model)
    assert layers
    artifact = compile_decoder(model, result, path=tmp_path / "m.rwa", target="cpu", max_length=64)
    new = torch.as_tensor(artifact.generate(prompt.numpy(), 20))
    wanted, leads = follows(result.model, prompt, new, 64)
    sure = leads > 1e-3  # where two tokens are all but equal, rounding may choose
    assert torch.equal(new[sure], wanted[sure])
    assert sure.float().mean() > 0.8


def test_the_same_layers_are_sealed_in_a_step() -> None:
    model = MODELS["gpt2"]()
    ids = torch.randint(0, VOCABULARY, (1, 24))
    result = rewrite(model, {"input_ids": ids}, linear="shift,*mlp*")
    step = seal_step(model, result.rewritten, tokens=1, length=32)
    found = [n for n in step.program.graph.nodes if is_linear_op(n.target)]
    assert len(found) == len(linear_modules(result.model)) == 4
    linear_modules(result.model).popitem()
    module = next(iter(linear_modules(result.model).values()))
    object.__setattr__(module.layer, "id", "somewhere.else")
    with pytest.raises(ModelError, match=r"somewhere\.else"):
        seal_step(model, result.rewritten, tokens=1, length=32)
