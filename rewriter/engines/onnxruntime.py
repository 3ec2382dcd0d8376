"""ONNX Runtime's CPU provider with all graph optimisations."""

from __future__ import annotations

from rewriter.engines import Array, Call, Engine, Job
from rewriter.engines.onnx_file import onnx_file


def prepare(job: Job) -> Call:
    """The exported model in an inference session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(onnx_file(job)), options, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    feeds = {name: array for name, array in job.inputs.items() if name in taken}

    def call() -> list[Array]:
        return list(session.run(None, feeds))

    return call


ENGINES = (
    Engine(
        "onnxruntime",
        "ONNX Runtime",
        prepare,
        needs=("onnxruntime", "onnx", "onnxscript"),
        extra="bench",
    ),
)
