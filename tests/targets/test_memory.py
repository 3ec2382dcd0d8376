"""Planned memory: counted by hand on small chains, kept by the cache, said by the manifest."""

import torch
from torch import nn

from codegen.build import build
from codegen.frontend import to_relax
from codegen.kernel_cache import KernelCache
from codegen.lower import lower
from codegen.memory import Memory
from codegen.target import target_named
from rewriter.api import compile as compile_artifact

TARGET = target_named("cpu")


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 32)
    ).eval()


def imported(model, x):
    return to_relax(torch.export.export(model, (x,)), TARGET)


def test_a_chain_holds_its_widest_pair_of_neighbours():
    model = chain()
    memory = lower(imported(model, torch.randn(10, 64)), TARGET).memory
    # The first product's rows and the second's: what follows fits into the first one's place.
    assert memory.activations == 10 * (256 + 64) * 4
    stored = 4 * (64 * 256 + 256 + 256 * 64 + 64 * 3 + 64 * 32)
    assert memory.weights == stored
    assert memory.peak == memory.activations + memory.weights


def test_memory_grows_with_rows_and_weights_do_not():
    model = chain()
    few, many = (lower(imported(model, torch.randn(n, 64)), TARGET).memory for n in (8, 80))
    assert many.activations == 10 * few.activations
    assert many.weights == few.weights


def test_buffers_of_a_deep_chain_are_shared():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96)) for _ in range(9)))
    memory = lower(imported(model.eval(), torch.randn(16, 96)), TARGET).memory
    assert 2 * 16 * 96 * 4 <= memory.activations <= 3 * 16 * 96 * 4


def test_the_cache_keeps_it(tmp_path):
    cache, model = KernelCache(tmp_path), imported(chain(), torch.randn(10, 64))
    first = lower(model, TARGET, cache=cache)
    build(first, TARGET, cache=cache)
    second = lower(model, TARGET, cache=cache)
    assert second.code is not None
    assert isinstance(second.memory, Memory)
    assert second.memory == first.memory


def test_manifest_and_report_say_it(tmp_path):
    x = torch.randn(10, 64)
    made = compile_artifact(chain(), (x,), path=tmp_path / "m.rwa", on_noop="ok")
    said = made.report["artifact"]["memory"]
    assert made.manifest.peak_memory == said["peak_bytes"]
    assert said["peak_bytes"] == said["activations_bytes"] + said["weights_bytes"]
    assert said["weights_bytes"] == made.report["artifact"]["weights_bytes"]
