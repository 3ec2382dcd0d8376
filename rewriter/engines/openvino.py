"""OpenVINO on the CPU: in float32, and as it chooses by itself (bfloat16 where the CPU has it)."""

from __future__ import annotations

from typing import Any

from rewriter.engines import Array, Call, Engine, Job
from rewriter.engines.onnx_file import onnx_file


def _prepare(job: Job, **properties: Any) -> Call:
    import openvino as ov

    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        **properties,
    }
    compiled = core.compile_model(core.read_model(str(onnx_file(job))), "CPU", settings)
    taken = {port.get_any_name() for port in compiled.inputs}
    feeds = {name: array for name, array in job.inputs.items() if name in taken}
    request = compiled.create_infer_request()

    def call() -> list[Array]:
        results = request.infer(feeds, share_inputs=True, share_outputs=True)
        return [results[port] for port in compiled.outputs]

    return call


def prepare_f32(job: Job) -> Call:
    """The exported model, computed in float32."""
    return _prepare(job, INFERENCE_PRECISION_HINT="f32")


def prepare_default(job: Job) -> Call:
    """The exported model in the precision OpenVINO picks."""
    return _prepare(job)


_NEEDS = ("openvino", "onnx", "onnxscript")
ENGINES = (
    Engine("openvino-f32", "OpenVINO (float32)", prepare_f32, _NEEDS, "openvino", "bench"),
    Engine(
        "openvino-default", "OpenVINO (its default)", prepare_default, _NEEDS, "openvino", "bench"
    ),
)
