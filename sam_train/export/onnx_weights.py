"""Smaller forms of an exported ONNX file, for a browser."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

SMALLEST_HALVED = 256
"""Tensors of fewer numbers than these stay in float32: nothing is gained."""


def halve(source: Path, target: Path) -> None:
    """Stores weights as float16, and has the runtime widen them when it opens the file.

    All arithmetic stays in float32, so that every runtime takes the file, with or without float16 kernels.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < SMALLEST_HALVED or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def quantise(source: Path, target: Path) -> None:
    """Dynamic int8: weights of matrix products in 8 bits, activations when they come (onnxruntime's)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Its advice to optimise the graph first is about static quantisation.
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
    finally:
        log.setLevel(level)
