"""The models of the benchmarks, written as a registry: the same bytes at every run, with weights that mean nothing.

Shapes are those of models that people serve, and only the shapes: what a run costs does not depend on the weights.
They are drawn so that activations neither vanish nor blow up, since the server's self-test must be able to tell rows
apart. None is committed. `python benches/models.py [FOLDER]` writes them all, by default below target/bench-models.
"""

import hashlib
import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "target/bench-models"

SEED = 20_26
OPSET, IR_VERSION = 17, 8  # what every ONNX Runtime of the last years reads

IDENTITY_WIDTH = 1 << 18  # of FP32: 1 MiB
IMAGE = (3, 224, 224)  # of FP32: 602 kB
# all-MiniLM-L6-v2's sizes.
LAYERS, HEADS, HIDDEN, INTERMEDIATE, VOCABULARY, POSITIONS = 6, 12, 384, 1536, 30_522, 512
# MobileNetV2's blocks: expansion, channels, repetitions, stride of the first.
BLOCKS = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class Graph:
    """Nodes and weights in the order in which they are asked for; every model draws from its own numbers."""

    def __init__(self, name):
        self.name, self.nodes, self.weights, self.shared = name, [], [], {}
        self.random = np.random.default_rng([SEED, *name.encode()])

    def weight(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def const(self, value, dtype=np.int64):
        """A small constant, once."""
        key = (str(value), dtype)
        if key not in self.shared:
            self.shared[key] = self.weight(np.array(value, dtype))
        return self.shared[key]

    def normal(self, shape, scale):
        return self.weight(self.random.normal(0.0, scale, shape).astype(np.float32))

    def op(self, kind, *inputs, out=None, **attributes):
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def linear(self, x, inputs, outputs, scale=None, out=None):
        """Of rows, as exporters write it."""
        scale = (2 / inputs) ** 0.5 if scale is None else scale
        return self.op("Gemm", x, self.normal((inputs, outputs), scale), self.normal(outputs, 0.1), out=out)

    def bytes(self, inputs, outputs):
        """`inputs` and `outputs`: (name, element type, dimensions)."""
        infos = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, self.name, *infos, self.weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tidegate-benches")
        onnx.checker.check_model(model)
        return model.SerializeToString(deterministic=True)


def mlp():
    """Tabular: 30 features, two hidden layers, two classes."""
    g, x = Graph("mlp"), "features"
    for inputs, outputs in ((30, 64), (64, 32)):
        x = g.op("Relu", g.linear(x, inputs, outputs))
    g.op("Softmax", g.linear(x, 32, 2), axis=1, out="probabilities")
    return g.bytes(
        [("features", TensorProto.FLOAT, ["batch", 30])], [("probabilities", TensorProto.FLOAT, ["batch", 2])]
    )


def digits_cnn():
    """Images of 8×8: two convolutions, a pool, two dense layers."""
    g, x = Graph("digits_cnn"), "image"
    for inputs, outputs in ((1, 16), (16, 32)):
        weights = g.normal((outputs, inputs, 3, 3), (2 / (inputs * 9)) ** 0.5)
        x = g.op("Relu", g.op("Conv", x, weights, g.normal(outputs, 0.1), kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    x = g.op("Flatten", g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), axis=1)
    x = g.op("Relu", g.linear(x, 32 * 16, 64))
    g.op("Softmax", g.linear(x, 64, 10), axis=1, out="probabilities")
    return g.bytes(
        [("image", TensorProto.FLOAT, ["batch", 1, 8, 8])], [("probabilities", TensorProto.FLOAT, ["batch", 10])]
    )


def encoder():
    """BERT as exporters write it, in MiniLM's sizes, pooled to one embedding a row by the mean of unmasked tokens."""
    g = Graph("encoder")

    def norm(x):
        scale = 1.0 + g.random.normal(0.0, 0.05, HIDDEN)
        return g.op(
            "LayerNormalization", x, g.weight(scale.astype(np.float32)), g.normal(HIDDEN, 0.05), axis=-1, epsilon=1e-12
        )

    def dense(x, inputs, outputs):
        product = g.op("MatMul", x, g.normal((inputs, outputs), inputs**-0.5))
        return g.op("Add", product, g.normal(outputs, 0.05))

    words, positions, types = (g.normal((rows, HIDDEN), 0.5) for rows in (VOCABULARY, POSITIONS, 2))
    length = g.op("Slice", g.op("Shape", "input_ids"), g.const([1]), g.const([2]), g.const([0]))
    x = g.op("Add", g.op("Gather", words, "input_ids"), g.op("Gather", types, "token_type_ids"))
    x = norm(g.op("Add", x, g.op("Slice", positions, g.const([0]), length, g.const([0]))))
    mask = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    hide = g.op("Sub", g.const(1.0, np.float32), g.op("Unsqueeze", mask, g.const([1, 2])))
    hide = g.op("Mul", hide, g.const(-10_000.0, np.float32))
    split, join = g.const([0, 0, HEADS, HIDDEN // HEADS]), g.const([0, 0, HIDDEN])
    for _ in range(LAYERS):
        heads = [g.op("Reshape", dense(x, HIDDEN, HIDDEN), split) for _ in range(3)]
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        query, key, value = (g.op("Transpose", head, perm=perm) for head, perm in zip(heads, orders))
        scores = g.op("Div", g.op("MatMul", query, key), g.const((HIDDEN / HEADS) ** 0.5, np.float32))
        scores = g.op("Softmax", g.op("Add", scores, hide), axis=-1)
        seen = g.op("Transpose", g.op("MatMul", scores, value), perm=[0, 2, 1, 3])
        x = norm(g.op("Add", dense(g.op("Reshape", seen, join), HIDDEN, HIDDEN), x))
        wide = dense(x, HIDDEN, INTERMEDIATE)
        gate = g.op("Erf", g.op("Div", wide, g.const(2**0.5, np.float32)))
        gelu = g.op("Mul", wide, g.op("Add", gate, g.const(1.0, np.float32)))
        gelu = g.op("Mul", gelu, g.const(0.5, np.float32))
        x = norm(g.op("Add", dense(gelu, INTERMEDIATE, HIDDEN), x))
    kept = g.op("Unsqueeze", mask, g.const([2]))
    total = g.op("ReduceSum", g.op("Mul", x, kept), g.const([1]), keepdims=0)
    count = g.op("Clip", g.op("ReduceSum", kept, g.const([1]), keepdims=0), g.const(1e-9, np.float32))
    g.op("Div", total, count, out="embedding")
    tokens = [(name, TensorProto.INT64, ["batch", "sequence"]) for name in ENCODER_INPUTS]
    return g.bytes(tokens, [("embedding", TensorProto.FLOAT, ["batch", HIDDEN])])


ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def mobilenet():
    """MobileNetV2, its norms not folded into the convolutions: that is the engine's work."""
    g = Graph("mobilenet")

    def conv(x, inputs, outputs, size=1, stride=1, groups=1, clipped=True):
        weights = g.normal((outputs, inputs // groups, size, size), (2 * groups / (inputs * size * size)) ** 0.5)
        shape = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [size // 2] * 4, "group": groups}
        x = g.op("Conv", x, weights, **shape)
        mean, variance = g.normal(outputs, 0.1), g.weight(g.random.uniform(0.8, 1.2, outputs).astype(np.float32))
        scale = g.weight(g.random.uniform(0.8, 1.2, outputs).astype(np.float32))
        x = g.op("BatchNormalization", x, scale, g.normal(outputs, 0.1), mean, variance, epsilon=1e-5)
        return g.op("Clip", x, g.const(0.0, np.float32), g.const(6.0, np.float32)) if clipped else x

    x, channels = conv("image", 3, 32, size=3, stride=2), 32
    for expansion, outputs, repetitions, first_stride in BLOCKS:
        for block in range(repetitions):
            stride, wide = (first_stride if block == 0 else 1), channels * expansion
            y = conv(x, channels, wide) if expansion > 1 else x
            y = conv(y, wide, wide, size=3, stride=stride, groups=wide)
            y = conv(y, wide, outputs, clipped=False)
            x = g.op("Add", x, y) if stride == 1 and channels == outputs else y
            channels = outputs
    x = g.op("Flatten", g.op("GlobalAveragePool", conv(x, channels, 1280)), axis=1)
    g.linear(x, 1280, 1000, scale=0.05, out="logits")
    return g.bytes(
        [("image", TensorProto.FLOAT, ["batch", *IMAGE])], [("logits", TensorProto.FLOAT, ["batch", 1000])]
    )


def identity_1mib():
    """What goes in comes out: transport, and nothing else."""
    g = Graph("identity_1mib")
    g.op("Identity", "input", out="output")
    dims = ["batch", IDENTITY_WIDTH]
    return g.bytes([("input", TensorProto.FLOAT, dims)], [("output", TensorProto.FLOAT, dims)])


MODELS = {make.__name__: make for make in (mlp, digits_cnn, encoder, mobilenet, identity_1mib)}


def request(model, length=None, seed=0):
    """One row for a model, by input. `length`: tokens of the encoder's."""
    random = np.random.default_rng([SEED, *model.encode(), seed])
    if model == "encoder":
        ids = random.integers(0, VOCABULARY, (1, length), np.int64)
        return dict(zip(ENCODER_INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids))))
    name, shape = {
        "mlp": ("features", (30,)),
        "digits_cnn": ("image", (1, 8, 8)),
        "mobilenet": ("image", IMAGE),
        "identity_1mib": ("input", (IDENTITY_WIDTH,)),
    }[model]
    return {name: random.normal(0.0, 1.0, (1, *shape)).astype(np.float32)}


def as_json(inputs):
    """A request of the Open Inference Protocol, its numbers as short as they can be and still be the same FP32."""
    datatype = {"float32": "FP32", "int64": "INT64"}
    parts = [
        f'{{"name":"{name}","shape":{list(array.shape)},"datatype":"{datatype[array.dtype.name]}",'
        f'"data":[{",".join(map(str, array.ravel()))}]}}'
        for name, array in inputs.items()
    ]
    return f'{{"inputs":[{",".join(parts)}]}}'


def write(folder=FOLDER, names=tuple(MODELS)):
    """A registry of these models. Kept where it is there already."""
    for name in names:
        path = folder / name / "1/model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = MODELS[name]()
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    return folder


def linked(folder, names=tuple(MODELS), settings=None):
    """Another registry of models that are written, each with the same `model.toml` if there is one. Hard links: the
    server follows no symbolic ones out of a registry."""
    for name in names:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1/model.onnx").hardlink_to(FOLDER / name / "1/model.onnx")
        if settings is not None:
            (folder / name / "model.toml").write_text(settings)
    return folder


def main(folder):
    for name in MODELS:
        path = write(folder, (name,)) / name / "1/model.onnx"
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.stat().st_size:>10}  {name}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
