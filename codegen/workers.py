"""Threads that run compiled code, each with a TVM thread pool of the size asked for.

TVM keeps one pool per calling thread, sizes it at its first use, ties its workers to cores and
narrows the affinity of the thread that asked. So the code is called from threads of our own: the
caller's affinity stays as it is, loads with different numbers of threads live side by side, and a
process that calls from many threads does not get as many pools. After a fork, the child starts
new threads at its first call. Ctrl-C reaches the caller at once while a worker finishes its run.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from codegen.target import usable_cores
from codegen.tvm_runtime import load_ffi

_SHARE_ALL_CORES = -3  # AffinityMode of TVM's threading_backend.h


class _Job:
    def __init__(self, work: Callable[[Worker], Any]) -> None:
        self.work = work
        self.done = threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, worker: Worker) -> None:
        try:
            self.result = self.work(worker)
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()


class Worker:
    """One thread with a TVM pool of `threads` threads, itself included. `state` is its own."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.state: dict[int, Any] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="rewriter-worker", daemon=True)
        self._thread.start()
        self.call(lambda _: _size_pool(threads))

    def call(self, work: Callable[[Worker], Any]) -> Any:
        """`work(self)` in this thread: its result, or what it raised."""
        job = _Job(work)
        self._jobs.put(job)
        job.done.acquire()
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # the traceback holds this frame: leave no cycle behind
        return job.result

    def stop(self) -> None:
        """Let the thread end (its TVM pool with it) and wait for that."""
        self._jobs.put(None)
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run(self)
            del job  # do not keep the last run's arrays while waiting


def _size_pool(threads: int) -> None:
    """Make this thread's TVM pool; must come before anything else of TVM runs in it."""
    ffi = load_ffi()
    configure = ffi.get_global_func("runtime.config_threadpool")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = cores or list(range(usable_cores()))
    # The first call sizes the pool by the length of the list; the second opens all cores to it.
    for listed in (cores[:threads], cores):
        configure(_SHARE_ALL_CORES, threads, [str(core) for core in listed])


class WorkerPool:
    """Up to cores/threads workers, made as calls need them; more calls than that wait."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._free = threading.Semaphore(max(1, usable_cores() // threads))
        self._idle: list[Worker] = []
        self._all: list[Worker] = []

    def call(self, work: Callable[[Worker], Any]) -> Any:
        """`work(worker)` in a worker that is free, or becomes so."""
        with self._free:
            worker = self._take()
            try:
                return worker.call(work)
            finally:
                # After Ctrl-C it may still be busy: the next call then waits in its queue.
                self._idle.append(worker)

    def _take(self) -> Worker:
        try:
            return self._idle.pop()
        except IndexError:
            worker = Worker(self._threads)
            self._all.append(worker)
            return worker

    def forget(self, key: int) -> None:
        """Drop what every worker keeps under `key`."""
        for worker in list(self._all):
            worker.state.pop(key, None)

    def stop(self) -> None:
        """Stop all workers."""
        for worker in self._all:
            worker.stop()


_pools: dict[int, WorkerPool] = {}
_lock = threading.Lock()


def pool_of(threads: int) -> WorkerPool:
    """This process's pool of workers with `threads` threads each."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = WorkerPool(threads)
        return _pools[threads]


def forget(threads: int, key: int) -> None:
    """Drop what the workers of that pool keep under `key`, if there are any."""
    if (pool := _pools.get(threads)) is not None:
        pool.forget(key)


# What a child must not touch after a fork is kept alive here: its threads are not in the child.
_lost: list[dict[int, WorkerPool]] = []


def _after_fork() -> None:
    global _pools, _lock
    _lost.append(_pools)
    _pools, _lock = {}, threading.Lock()


def _stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop_all)
