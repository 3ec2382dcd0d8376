"""Artifacts that generate: equal to the rewritten model token by token, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegen.decoding import Decoder
from codegen.runtime import Artifact, load
from passes.decode_seal import seal_step
from passes.errors import FormError, InputError, ModelError, UsageError
from passes.form import form_named
from rewriter.api import Result, rewrite
from rewriter.decode import compile_decoder
from rewriter.decode_models import language_model, told_positions
from rewriter.loaded import LoadedModel
from tests.decode_models import MODELS, VOCABULARY, follows, tiny_gpt2, tiny_llama

ROOM = 128  # tokens of the traced example
THREE_LAYERS = {"gpt2": {"n_layer": 3}, "llama": {"num_hidden_layers": 3}}


def opened(name: str, batch: int = 2, **changes: Any) -> LoadedModel:
    ids = torch.randint(0, VOCABULARY, (batch, ROOM))
    model = MODELS[name](**changes)
    return language_model(LoadedModel(model, {"input_ids": ids}, f"tiny {name}", "text"))


@dataclass
class Made:
    loaded: LoadedModel
    result: Result
    artifact: Artifact


def made(folder: Path, name: str, layers: str, **options: Any) -> Made:
    loaded = opened(name, **THREE_LAYERS[name])
    rules = {f"*{layers}{n}.*": form for n, form in enumerate(("exact", "elu", "hedgehog"))}
    result = rewrite(loaded.model, loaded.example_inputs, rules=rules, on_noop="ok")
    path = folder / f"{name}.rwa"
    artifact = compile_decoder(loaded.model, result, path=path, chunk=16, threads=1, **options)
    return Made(loaded, result, artifact)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Llama: one layer of each form (a cache of keys and values, and sums)."""
    done = made(tmp_path_factory.mktemp("mixed"), "llama", "layers.", max_length=ROOM)
    yield done
    done.artifact.close()


def assert_greedy(case: Made, prompt: torch.Tensor, new: Any) -> None:
    """Every token is the eager model's choice; where two are level, rounding may decide."""
    wanted, lead = follows(case.result.model, prompt, new, ROOM)
    same = np.asarray(new) == wanted.numpy()
    level = lead.numpy() < 2e-4
    assert (same | level).all(), np.argwhere(~(same | level))
    assert level.mean() < 0.05


def prompt_of(tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens))


@pytest.mark.parametrize("tokens", [1, 16, 37])  # a step, a chunk, chunks and steps
def test_generation_equals_the_rewritten_model(mixed: Made, tokens: int) -> None:
    prompt = prompt_of(tokens)
    new = mixed.artifact.generate(prompt.numpy(), 64)
    assert new.shape == (2, 64)
    assert_greedy(mixed, prompt, new)
    assert len(np.unique(new)) > 5


def test_it_says_what_it_is(mixed: Made) -> None:
    assert mixed.artifact.manifest.decode["length"] == ROOM
    assert mixed.artifact.report["compiled"]["ok"]
    assert any("generates for 2 sequences" in n for n in mixed.artifact.report["notes"])
    names = {k["name"] for k in mixed.artifact.report["kernels"]}
    assert any(n.startswith("prefill_") for n in names)
    assert any(n.startswith("step_") for n in names)


def test_a_decoder_goes_on_from_its_state(mixed: Made) -> None:
    prompt = prompt_of(50).numpy()
    whole, parts = Decoder(mixed.artifact), Decoder(mixed.artifact)
    want = whole.feed(prompt)
    parts.feed(prompt[:, :20])
    parts.feed(prompt[:, 20:21])
    np.testing.assert_allclose(parts.feed(prompt[:, 21:]), want, atol=1e-3)
    assert whole.position == parts.position == 50
    whole.reset()
    assert whole.position == 0
    np.testing.assert_array_equal(whole.feed(prompt), want)


def test_two_decoders_do_not_meet(mixed: Made) -> None:
    a, b = prompt_of(9).numpy(), prompt_of(5).numpy()
    alone = mixed.artifact.generate(a, 20)
    first, other = Decoder(mixed.artifact), Decoder(mixed.artifact)
    steps = zip(first.stream(a, 20), other.stream(b, 20), strict=True)
    np.testing.assert_array_equal(np.stack([x for x, _ in steps], 1), alone)


def test_stop_ends_a_sequence_and_then_all(mixed: Made) -> None:
    prompt = prompt_of(6).numpy()
    plain = mixed.artifact.generate(prompt, 40)
    ends = [int(plain[0, 3]), int(plain[1, 7])]
    stopped = mixed.artifact.generate(prompt, 40, stop=ends)
    where = [int(np.isin(row, ends).argmax()) for row in plain]
    assert stopped.shape[1] == max(where) + 1
    for row, full, at in zip(stopped, plain, where, strict=True):
        np.testing.assert_array_equal(row[: at + 1], full[: at + 1])
        assert (row[at:] == full[at]).all()


def test_no_new_tokens_and_one(mixed: Made) -> None:
    prompt = prompt_of(ROOM).numpy()
    assert mixed.artifact.generate(prompt, 0).shape == (2, 0)
    assert mixed.artifact.generate(prompt, 1).shape == (2, 1)  # it needs no room


@pytest.mark.parametrize(
    ("tokens", "number", "words"),
    [
        (np.zeros((2, ROOM), np.int64), 2, "up to 128 tokens"),
        (np.zeros((3, 4), np.int64), 1, r"\[2, n\] expected"),
        (np.zeros((2, 0), np.int64), 1, "at least one token"),
        (np.zeros((2, 4), np.float32), 1, "whole numbers expected"),
        (np.full((2, 4), VOCABULARY), 1, f"token {VOCABULARY} is out of range"),
        (np.full((2, 4), -1), 1, "token -1 is out of range"),
        (np.zeros((2, 4), np.int64), -1, "max_new: -1 given"),
    ],
)
def test_wrong_tokens_are_refused(mixed: Made, tokens: Any, number: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mixed.artifact.generate(tokens, number)


def test_a_fresh_process_needs_neither_torch_nor_the_compiler(mixed: Made) -> None:
    prompt = prompt_of(20).numpy()
    code = (
        "import sys, json, numpy as np\n"
        "from codegen.runtime import load\n"
        "new = load(sys.argv[1], threads=1).generate(np.array(json.loads(sys.argv[2])), 30)\n"
        "assert not {'torch', 'tvm', 'transformers'} & set(sys.modules)\n"
        "print(json.dumps(new.tolist()))\n"
    )
    command = [sys.executable, "-c", code, str(mixed.artifact.path), json.dumps(prompt.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == mixed.artifact.generate(prompt, 30).tolist()


def test_it_is_not_called_like_others(mixed: Made) -> None:
    with pytest.raises(UsageError, match="generates tokens"):
        mixed.artifact.run({})


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_rings_and_positions_follow_the_state(tmp_path: Path, name: str) -> None:
    """A ring of 2 x 5 tokens that turns many times, features by position, sums that are normed."""
    loaded = opened(name, **THREE_LAYERS[name])
    chosen = (form_named("lolcats", {"window": 5}), "cosformer", "norm_linear")
    layer = {"llama": "layers.", "gpt2": "h."}[name]
    rules = {f"*{layer}{n}.*": form for n, form in enumerate(chosen)}
    result = rewrite(loaded.model, loaded.example_inputs, rules=rules)
    path = tmp_path / "x.rwa"
    artifact = compile_decoder(loaded.model, result, path=path, chunk=16, threads=1)
    case = Made(loaded, result, artifact)
    for tokens in (1, 37):
        prompt = prompt_of(tokens)
        assert_greedy(case, prompt, artifact.generate(prompt.numpy(), 80))
    assert artifact.manifest.decode["length"] == 256
    artifact.close()


def test_codes_are_summed_token_by_token(tmp_path: Path) -> None:
    """The keys are the queries, as where the model is run on all tokens."""
    loaded = opened("gpt2")
    result = rewrite(loaded.model, loaded.example_inputs, form="hamming")
    artifact = compile_decoder(
        loaded.model, result, path=tmp_path / "x.rwa", max_length=ROOM, chunk=16, threads=1
    )
    prompt = prompt_of(37)
    new = artifact.generate(prompt.numpy(), 64)
    assert_greedy(Made(loaded, result, artifact), prompt, new)
    artifact.close()


def test_keys_of_a_window_are_kept_in_a_ring(tmp_path: Path) -> None:
    """Mistral's own window, narrowed in one layer: a state of constant size."""
    loaded = opened("mistral", num_hidden_layers=3)
    rules = {"*layers.0.*": form_named("window", {"left": 7}), "*layers.1.*": "gated"}
    result = rewrite(loaded.model, loaded.example_inputs, rules=rules)
    assert {s.mask.window for s in result.rewritten.sites} == {(19, 0)}
    artifact = compile_decoder(loaded.model, result, path=tmp_path / "x.rwa", chunk=16, threads=1)
    assert artifact.manifest.decode["length"] is None
    for tokens in (1, 37):
        prompt = prompt_of(tokens)
        new = artifact.generate(prompt.numpy(), 80)
        assert_greedy(Made(loaded, result, artifact), prompt, new)
    artifact.close()


def test_a_window_that_the_example_does_not_show_limits_the_length(tmp_path: Path) -> None:
    loaded = opened("mistral", sliding_window=200)
    result = rewrite(loaded.model, loaded.example_inputs, form="exact", on_noop="ok")
    path = tmp_path / "x.rwa"
    with pytest.raises(UsageError, match=r"sees 200 keys.*128 tokens.*--tokens 201.*got 201"):
        compile_decoder(loaded.model, result, path=path, max_length=201)
    artifact = compile_decoder(loaded.model, result, path=path, threads=1)
    assert artifact.manifest.decode["length"] == 200
    artifact.close()


def test_a_span_limits_the_length(tmp_path: Path) -> None:
    loaded = opened("llama")
    result = rewrite(loaded.model, loaded.example_inputs, form="cosformer")
    with pytest.raises(FormError, match=r"tokens 1024 apart.*to have 1025"):
        compile_decoder(loaded.model, result, path=tmp_path / "x.rwa", max_length=1025)


@pytest.mark.slow
def test_learned_positions_follow_the_state(tmp_path: Path) -> None:
    done = made(tmp_path, "gpt2", "h.")
    for tokens in (1, 21):
        prompt = prompt_of(tokens)
        assert_greedy(done, prompt, done.artifact.generate(prompt.numpy(), 80))
    assert done.artifact.manifest.decode["length"] == 256
    done.artifact.close()


def test_learned_positions_limit_the_length(tmp_path: Path) -> None:
    loaded = opened("gpt2", n_layer=1)
    result = rewrite(loaded.model, loaded.example_inputs, form="elu")
    with pytest.raises(UsageError, match="positions for 256 tokens at most, got 257"):
        compile_decoder(loaded.model, result, path=tmp_path / "x.rwa", max_length=257, chunk=1)
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_can_not_stream_is_named(tmp_path: Path) -> None:
    loaded = opened("llama")
    result = rewrite(loaded.model, loaded.example_inputs, form="topk")
    with pytest.raises(FormError, match=r"layers\.0.*topk") as told:
        compile_decoder(loaded.model, result, path=tmp_path / "x.rwa")
    assert "layers.1" in str(told.value)


def test_a_mask_of_padding_is_refused(tmp_path: Path) -> None:
    from rewriter.plain import plain

    model = plain(tiny_llama(), ("input_ids", "attention_mask"), outputs=("logits",))
    ids = torch.randint(0, VOCABULARY, (1, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result = rewrite(model, inputs, form="exact", on_noop="ok")
    with pytest.raises(FormError, match="M05"):
        compile_decoder(model, result, path=tmp_path / "x.rwa")


def test_a_base_model_is_read_out_with_its_embeddings_only_where_they_are_tied() -> None:
    from rewriter.models import load_model

    loaded = language_model(load_model("llama-tiny", tokens=8))
    assert list(loaded.example_inputs) == ["input_ids"]
    with torch.no_grad():
        logits = loaded.model(**loaded.example_inputs)["logits"]
    assert logits.shape == (1, 8, 8000)
    base = tiny_llama().model
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ModelError, match="has no head"):
        language_model(LoadedModel(base, ids, "mine", "text"))


def test_a_folder_of_a_language_model(tmp_path: Path) -> None:
    from rewriter.models import load_model

    tiny_llama().save_pretrained(tmp_path)
    loaded = language_model(load_model(str(tmp_path), tokens=12, batch=2))
    assert list(loaded.example_inputs) == ["input_ids"]  # its mask of padding is left out
    result = rewrite(loaded.model, loaded.example_inputs, form="elu")
    assert [s.mask.kind for s in result.rewritten.sites] == ["causal", "causal"]
    ids, logits = loaded.example_inputs["input_ids"], result.model(**loaded.example_inputs)
    with told_positions(loaded.model) as model:
        sealed = seal_step(model, result.rewritten, tokens=12, length=12)
    given = (ids, torch.arange(12).expand(2, 12), *(s.zeros() for s in sealed.states))
    last = sealed.program.module()(*given)[0]
    torch.testing.assert_close(last, logits["logits"][:, -1], rtol=1e-4, atol=1e-4)


def test_models_that_do_not_generate() -> None:
    from rewriter.models import load_model

    with pytest.raises(ModelError, match="decoder-only"):
        language_model(load_model("t5-small-encoder", tokens=8))
    inputs = {"inputs_embeds": torch.zeros(1, 2, 32)}
    by_vectors = LoadedModel(tiny_gpt2(n_layer=1), inputs, "x", "other")
    with pytest.raises(ModelError, match="takes no input_ids"):
        language_model(by_vectors)


def test_an_artifact_of_another_kind_says_so(tmp_path: Path) -> None:
    from rewriter.api import compile as compile_artifact

    module = torch.nn.Linear(4, 4).eval()
    path = tmp_path / "linear.rwa"
    compile_artifact(module, (torch.randn(2, 4),), path=path, on_noop="ok", threads=1).close()
    with load(path) as artifact, pytest.raises(UsageError, match="--decode"):
        artifact.generate(np.zeros((1, 1), np.int64), 1)
