"""ONNX graphs of the example models: float32, a free leading dimension called `batch`, weights as initializers."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node
from skl2onnx import to_onnx

OPSETS = {"": 17, "ai.onnx.ml": 3}
IR_VERSION = 8


def onnx_model(name, nodes, weights, inputs, outputs) -> onnx.ModelProto:
    """A checked model. `inputs` and `outputs` map a name to (element type, dimensions after `batch`), `weights` a name to an array."""
    infos = [[helper.make_tensor_value_info(n, kind, ["batch", *dims]) for n, (kind, dims) in side.items()] for side in (inputs, outputs)]
    initializers = [numpy_helper.from_array(np.asarray(array), n) for n, array in weights.items()]
    domains = {node.domain for node in nodes} | {""}
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items() if domain in domains]
    model = helper.make_model(helper.make_graph(nodes, name, *infos, initializers), opset_imports=opsets, producer_name="train.py")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model


def dense_model(name, input, output, mean, scale, layers) -> onnx.ModelProto:
    """(input - mean) / scale, then `layers` of (weight [in, out], bias [out]) with Relu between, and Softmax last for probabilities."""
    weights = {"mean": np.float32(mean), "scale": np.float32(scale)}
    nodes = [make_node("Sub", [input, "mean"], ["centred"]), make_node("Div", ["centred", "scale"], ["hidden0"])]
    for i, (weight, bias) in enumerate(layers):
        weights |= {f"weight{i}": np.float32(weight), f"bias{i}": np.float32(bias)}
        if i:
            nodes.append(make_node("Relu", [f"sum{i - 1}"], [f"hidden{i}"]))
        nodes.append(make_node("Gemm", [f"hidden{i}", f"weight{i}", f"bias{i}"], [f"sum{i}"]))
    if output == "probabilities":
        nodes.append(make_node("Softmax", [nodes[-1].output[0]], [output], axis=-1))
    else:
        nodes[-1].output[0] = output
    width, classes = len(layers[0][0]), len(layers[-1][1])
    return onnx_model(name, nodes, weights, {input: (TensorProto.FLOAT, [width])}, {output: (TensorProto.FLOAT, [classes])})


def forest_model(name, forest, width, classes) -> onnx.ModelProto:
    """skl2onnx's tree ensemble under this registry's names, without the ZipMap that would turn the probabilities into a list of maps."""
    exported = to_onnx(forest, np.zeros((1, width), np.float32), target_opset=OPSETS, options={"zipmap": False}).graph
    inputs, outputs = {"features": (TensorProto.FLOAT, [width])}, {"label": (TensorProto.INT64, []), "probabilities": (TensorProto.FLOAT, [classes])}
    renamed = dict(zip((value.name for value in (*exported.input, *exported.output)), (*inputs, *outputs)))
    for node in exported.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        node.output[:] = [renamed.get(n, n) for n in node.output]
    return onnx_model(name, list(exported.node), {t.name: numpy_helper.to_array(t) for t in exported.initializer}, inputs, outputs)
