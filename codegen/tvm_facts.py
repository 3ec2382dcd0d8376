"""What the installed TVM can do, for `rewriter doctor`."""

from __future__ import annotations

from typing import Any

from codegen import tvm_env  # noqa: F401  (environment before tvm)

KINDS = ("llvm", "cuda", "rocm", "opencl", "vulkan", "metal", "hexagon", "rpc")


def tvm_facts() -> dict[str, Any]:
    """{"version", "enabled": kinds whose runtime is here, "compiles": kinds it makes code for}."""
    import tvm

    enabled = [kind for kind in KINDS if tvm.runtime.enabled(kind)]
    info = {str(k): str(v) for k, v in tvm.support.libinfo().items()}
    compiles = [k for k in ("llvm", "cuda") if info.get(f"USE_{k.upper()}", "OFF") != "OFF"]
    return {"version": str(tvm.__version__), "enabled": enabled, "compiles": compiles}
