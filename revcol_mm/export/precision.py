# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""ONNX files in half precision, for GPUs."""
import numpy as np

#: Operators that compute in float16. Everything else stays in float32: coordinates of boxes need it.
HALF = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')


def convert_to_half(model) -> None:
    """Makes convolutions and matrix products compute in float16, and stores their weights so. Inputs and outputs stay.

    Args:
        model (onnx.ModelProto): the model, whose numbers are float32. It is changed.
    """
    from onnx import TensorProto, helper, numpy_helper
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == 'Identity'}  # weights that modules share
    halves: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type not in HALF:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if not name:  # an input that is left out
                continue
            source = same.get(name, name)
            if source not in halves:
                halves[source] = f'{source}_half'
                if source in weights:
                    values = numpy_helper.to_array(weights[source]).astype(np.float16)
                    graph.initializer.append(numpy_helper.from_array(values, halves[source]))
                else:
                    nodes.append(helper.make_node('Cast', [source], [halves[source]], to=TensorProto.FLOAT16))
            node.input[index] = halves[source]
        result, node.output[0] = node.output[0], f'{node.output[0]}_half'
        halves[result] = node.output[0]
        nodes += [node, helper.make_node('Cast', [node.output[0]], [result], to=TensorProto.FLOAT)]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
