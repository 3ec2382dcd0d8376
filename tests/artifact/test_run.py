"""Running an artifact: right answers, from many threads, many artifacts, after a fork."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from codegen import workers
from codegen.runtime import load
from codegen.target import usable_cores
from codegen.tvm_runtime import load_ffi
from passes.errors import ArtifactError, UsageError
from tests.artifact.conftest import Small


def test_runs_right_by_name_and_by_position(small: Small, small_file: Path) -> None:
    artifact = load(small_file)
    for seed in range(3):
        inputs = small.inputs(seed)
        small.assert_right(artifact.run(inputs), inputs)
        small.assert_right(artifact(*inputs.values()), inputs)
        small.assert_right(artifact(inputs["x"], ids=inputs["ids"]), inputs)


def test_outputs_are_the_callers_own(small: Small, small_file: Path) -> None:
    """Also an output that is an input; and they live on when all else is gone."""
    artifact, inputs = load(small_file), small.inputs(1)
    outputs = artifact.run(inputs)
    kept = {name: array.copy() for name, array in outputs.items()}
    for array in outputs.values():
        assert array.flags.owndata
        assert array.flags.writeable
        assert not np.shares_memory(array, inputs["x"])
    artifact.run(small.inputs(2))
    artifact.close()
    del artifact
    gc.collect()
    for name, array in outputs.items():
        np.testing.assert_array_equal(array, kept[name])


def test_same_answers_from_many_threads(small: Small, small_file: Path) -> None:
    artifact, wrong = load(small_file), []

    def many(seed: int) -> None:
        try:
            for step in range(20):
                inputs = small.inputs(100 * seed + step)
                small.assert_right(artifact.run(inputs), inputs)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_workers_run_side_by_side_with_one_thread_each(small: Small, small_file: Path) -> None:
    """With threads=1 calls go to several workers; each has its own machine."""
    artifact, wrong = load(small_file, threads=1), []
    barrier = threading.Barrier(4)

    def many(seed: int) -> None:
        try:
            barrier.wait(30)
            for step in range(20):
                inputs = small.inputs(100 * seed + step)
                small.assert_right(artifact.run(inputs), inputs)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_three_artifacts_in_one_process(small: Small, tmp_path: Path) -> None:
    """Equal code, other weights: each runs with its own."""
    models = []
    for i in range(3):
        weights = {name: array * np.float32(i + 1) for name, array in small.weights.items()}
        model = Small(small.code, weights, small.manifest)
        models.append((model, load(model.write(tmp_path / f"{i}.rwa"))))
    for seed, (model, artifact) in enumerate(models * 2):
        inputs = small.inputs(seed)
        model.assert_right(artifact.run(inputs), inputs)


def test_load_and_close_again_and_again(small: Small, small_file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(30):
        with load(small_file) as artifact:
            inputs = small.inputs(seed)
            small.assert_right(artifact.run(inputs), inputs)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_closed_artifact_refuses(small: Small, small_file: Path) -> None:
    artifact = load(small_file)
    artifact.close()
    artifact.close()
    with pytest.raises(ArtifactError, match="closed"):
        artifact.run(small.inputs(0))


def test_file_may_be_replaced_or_removed_while_loaded(small: Small, tmp_path: Path) -> None:
    path = small.write(tmp_path / "a.rwa")
    artifact = load(path)
    other = Small(small.code, {k: v * 0 for k, v in small.weights.items()}, small.manifest)
    other.write(path)
    inputs = small.inputs(0)
    small.assert_right(artifact.run(inputs), inputs)
    other.assert_right(load(path).run(inputs), inputs)
    path.unlink()
    small.assert_right(artifact.run(inputs), inputs)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_that_are_no_number(small_file: Path, threads: object) -> None:
    with pytest.raises(UsageError, match="threads"):
        load(small_file, threads=threads)  # type: ignore[arg-type]


def test_more_threads_than_cores_are_limited_with_a_warning(small: Small, small_file: Path) -> None:
    with pytest.warns(UserWarning, match="may use"):
        artifact = load(small_file, threads=usable_cores() + 3)
    assert artifact.threads == usable_cores()
    inputs = small.inputs(0)
    small.assert_right(artifact.run(inputs), inputs)


def test_default_threads_follow_the_variable(
    small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert load(small_file).threads == usable_cores()
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    assert load(small_file).threads == 1


def test_pools_have_the_threads_asked_for(small: Small, small_file: Path) -> None:
    """Also when another number was asked for before, which TVM itself does not offer."""
    tvm_threads = load_ffi().get_global_func("runtime.NumThreads")
    for threads in (1, usable_cores(), 1):
        artifact = load(small_file, threads=threads)
        artifact.run(small.inputs(0))
        assert workers.pool_of(threads).call(lambda worker: tvm_threads()) == threads
        assert workers.pool_of(threads).call(lambda worker: os.sched_getaffinity(0)) == (
            os.sched_getaffinity(0)
        )


def test_nothing_is_kept_of_closed_or_forgotten_artifacts(small: Small, small_file: Path) -> None:
    closed, forgotten, inputs = load(small_file), load(small_file), small.inputs(0)
    keys = {closed._key, forgotten._key}
    pool = workers.pool_of(closed.threads)

    def kept() -> set[int]:
        return keys & {key for worker in pool._all for key in worker.state}

    closed.run(inputs)
    forgotten.run(inputs)
    assert kept() == keys
    closed.close()
    del forgotten
    gc.collect()
    assert kept() == set()


def test_close_while_others_call(small: Small, small_file: Path) -> None:
    """Each call either ends right or is refused."""
    artifact, wrong, ended = load(small_file, threads=1), [], []

    def many(seed: int) -> None:
        try:
            inputs = small.inputs(seed)
            while True:
                small.assert_right(artifact.run(inputs), inputs)
                ended.append(seed)
        except ArtifactError as error:
            if "closed" not in str(error):
                wrong.append(error)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while len(ended) < 50 and not wrong:
        time.sleep(0.001)
    artifact.close()
    for thread in threads:
        thread.join(60)
    assert not wrong
    states = [worker.state for worker in workers.pool_of(1)._all]
    assert all(artifact._key not in state for state in states)


def test_callers_affinity_is_untouched(small: Small, small_file: Path) -> None:
    before = os.sched_getaffinity(0)
    load(small_file, threads=1).run(small.inputs(0))
    assert os.sched_getaffinity(0) == before


def test_runs_in_a_forked_child(small: Small, small_file: Path) -> None:
    artifact, inputs = load(small_file), small.inputs(0)
    artifact.run(inputs)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            small.assert_right(artifact.run(inputs), inputs)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    small.assert_right(artifact.run(inputs), inputs)
