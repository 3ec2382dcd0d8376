"""cuda:sm_90: NVIDIA Hopper (H100, H200).

Sizes from NVIDIA's CUDA programming guide, compute capability 9.0: 1024 threads per block, warps of
32, 227 KiB shared memory per block at most (48 KiB without opting in), 65,536 registers per block.
"""

from __future__ import annotations

from codegen.target import Target


def target() -> Target:
    """The target; code for it is made without a GPU, and run where there is one."""
    return Target(
        name="cuda:sm_90",
        kind="gpu",
        triple="x86_64-linux-gnu",
        tvm={
            "kind": "cuda",
            "arch": "sm_90",
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
            "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"},
        },
        features=("sm_90",),
        # A warp as a vector: sums along rows have 32 partial results, one for each lane.
        vector_bytes=64,
        vector_registers=255,
        l1_bytes=227 * 1024,
        l2_bytes=50 * 1024 * 1024,
        threads=1,
        description="NVIDIA Hopper GPU",
    )
