"""edge:cortex-a72: a small aarch64 board (Raspberry Pi 4 class), cross-compiled here.

Sizes from Arm's Cortex-A72 manual: 128-bit NEON, 32 vector registers, 32 KiB L1 data cache,
1 MiB shared L2 in the usual four-core cluster.
"""

from __future__ import annotations

from codegen.target import Target


def target() -> Target:
    """The target; nothing of this machine is read."""
    return Target(
        name="edge:cortex-a72",
        kind="edge",
        triple="aarch64-linux-gnu",
        tvm={
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": "cortex-a72",
            "num-cores": 4,
        },
        features=("asimd",),
        vector_bytes=16,
        vector_registers=32,
        l1_bytes=32 * 1024,
        l2_bytes=1024 * 1024,
        threads=4,
        description="aarch64 board with NEON, cross-compiled",
        options={"cc": ("aarch64-linux-gnu-gcc", "ziglang:aarch64-linux-gnu")},
    )
