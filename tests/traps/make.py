"""Writes the trap models: small ONNX files, each built to catch one wrong assumption.

    python make.py            writes tests/traps and tests/traps_bad
    python make.py --check    runs every trap in Python's onnxruntime and compares with the expected answers

Both folders are registries (`<name>/<version>/model.onnx`). Every model in `traps` is valid and
must be served; every model in `traps_bad` must be refused, alone, with a reason. The files are
committed, and writing them again gives the same bytes: seeds are fixed per trap.
"""

import argparse
import json
import pathlib
import zlib

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

HERE = pathlib.Path(__file__).resolve().parent
GOOD, BAD = HERE, HERE.parent / "traps_bad"
OPSET, IR_VERSION, SIZE_LIMIT = 17, 8, 200_000

BUILDERS = {}  # name -> () -> ModelProto
SAMPLES = {}  # name -> () -> (inputs, expected outputs or None where onnx's reference evaluator is asked)
RANDOM = {"random_noise"}  # no answer to expect


def trap(build):
    BUILDERS[build.__name__] = build
    return build


def sample(of):
    SAMPLES[of.__name__.removeprefix("sample_")] = of
    return of


def rng(name):
    """A generator of its own for each trap, so that adding one leaves the others' bytes alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def weights(name, *shape, scale=0.5):
    return rng(name).normal(0, scale, shape).astype(np.float32)


class Graph:
    """Collects nodes and constants, naming what nobody else needs to name."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def const(self, array, name=None):
        name = name or f"c{len(self.constants)}"
        # np.asarray, not ascontiguousarray: the latter makes a scalar one-dimensional.
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind, *inputs, out=None, outputs=None, **attributes):
        self.count += 1
        names = outputs or [out or f"{kind.lower()}_{self.count}"]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if len(names) == 1 else names

    def model(self, name, inputs, outputs, ml=False):
        graph = helper.make_graph(
            self.nodes, name, [info(*i) for i in inputs], [info(*o) for o in outputs], self.constants
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if ml:
            opsets.append(helper.make_opsetid("ai.onnx.ml", 3))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tidegate-traps"
        )


def info(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


# --- what may share a batch, and what may not -----------------------------------------------


@trap
def recurrent():
    """Traps: taking axis 0 of every input for the batch. The state's axis 0 counts layers."""
    g = Graph()
    first, second = (g.op("Gather", "state", g.const(np.int64(i)), axis=0) for i in (0, 1))
    drive = g.op("MatMul", "input", g.const(weights("recurrent.in", 16, 128)))
    hidden = g.op("Tanh", g.op("Add", drive, g.op("Mul", first, g.const(np.float32(0.5)))))
    kept = g.op("Mul", second, g.const(np.float32(0.9)))
    cell = g.op("Add", kept, g.op("Mul", hidden, g.const(np.float32(0.1))))
    g.op("MatMul", cell, g.const(weights("recurrent.out", 128, 1)), out="output")
    axis = g.const(np.array([0], np.int64))
    rows = [g.op("Unsqueeze", part, axis) for part in (hidden, cell)]
    g.op("Concat", *rows, out="state_out", axis=0)
    return g.model(
        "recurrent",
        [("input", T.FLOAT, ["batch", 16]), ("state", T.FLOAT, [2, "batch", 128])],
        [("output", T.FLOAT, ["batch", 1]), ("state_out", T.FLOAT, [2, "batch", 128])],
    )


@sample
def sample_recurrent():
    x, state = weights("x", 3, 16), weights("s", 2, 3, 128)
    hidden = np.tanh(x @ weights("recurrent.in", 16, 128) + 0.5 * state[0])
    cell = 0.9 * state[1] + 0.1 * hidden
    return {"input": x, "state": state}, {
        "output": cell @ weights("recurrent.out", 128, 1),
        "state_out": np.stack([hidden, cell]),
    }


@trap
def time_major():
    """Traps: taking a free leading axis for the batch. Here it is time; row i sums rows <= i."""
    g = Graph()
    past = g.op("CumSum", "sequence", g.const(np.int64(0)))
    g.op("MatMul", past, g.const(weights("time_major", 8, 4)), out="output")
    return g.model(
        "time_major", [("sequence", T.FLOAT, ["time", 8])], [("output", T.FLOAT, ["time", 4])]
    )


@sample
def sample_time_major():
    x = weights("x", 5, 8)
    return {"sequence": x}, {"output": np.cumsum(x, axis=0) @ weights("time_major", 8, 4)}


@trap
def time_pooled():
    """Traps: expecting as many output rows as input rows. All of time becomes one row."""
    g = Graph()
    mean = g.op("ReduceMean", "sequence", axes=[0], keepdims=1)
    g.op("MatMul", mean, g.const(weights("time_pooled", 8, 4)), out="output")
    return g.model(
        "time_pooled", [("sequence", T.FLOAT, ["time", 8])], [("output", T.FLOAT, [1, 4])]
    )


@sample
def sample_time_pooled():
    x = weights("x", 5, 8)
    return {"sequence": x}, {
        "output": x.mean(axis=0, keepdims=True) @ weights("time_pooled", 8, 4)
    }


@trap
def scalar():
    """Traps: rank 0. `scale` has no axis to batch along; some clients send it as [1]."""
    g = Graph()
    g.op("Mul", "x", "scale", out="y")
    return g.model(
        "scalar",
        [("x", T.FLOAT, ["batch", 4]), ("scale", T.FLOAT, [])],
        [("y", T.FLOAT, ["batch", 4])],
    )


@sample
def sample_scalar():
    x = weights("x", 3, 4)
    return {"x": x, "scale": np.array(2.5, np.float32)}, {"y": x * np.float32(2.5)}


@trap
def int8_dynamic():
    """Traps: batching dynamic quantisation. The scale comes from every row of the batch at once."""
    g = Graph()
    real = weights("int8_dynamic", 16, 8)
    scale = np.float32(np.abs(real).max() / 127)
    quantised = np.clip(np.round(real / scale), -127, 127).astype(np.int8)
    x, x_scale, x_zero = g.op("DynamicQuantizeLinear", "x", outputs=["x_q", "x_scale", "x_zero"])
    product = g.op("MatMulInteger", x, g.const(quantised, "w_q"), x_zero, g.const(np.int8(0), "w_zero"))
    scales = g.op("Mul", x_scale, g.const(scale, "w_scale"))
    g.op("Mul", g.op("Cast", product, to=T.FLOAT), scales, out="y")
    return g.model("int8_dynamic", [("x", T.FLOAT, ["batch", 16])], [("y", T.FLOAT, ["batch", 8])])


@sample
def sample_int8_dynamic():
    return {"x": weights("x", 3, 16)}, None


@trap
def row_coupled():
    """Traps: Softmax over axis 0, an innocent operator with the wrong axis."""
    g = Graph()
    g.op("Softmax", "x", out="y", axis=0)
    return g.model("row_coupled", [("x", T.FLOAT, ["batch", 4])], [("y", T.FLOAT, ["batch", 4])])


@sample
def sample_row_coupled():
    x = weights("x", 3, 4)
    return {"x": x}, {"y": np.exp(x) / np.exp(x).sum(axis=0, keepdims=True)}


# No two alike: onnxruntime 1.31 merges equal constants, then writes the running variance over them.
BATCH_NORM = {
    "scale": [1, 2, 0.5, 1.5],
    "bias": [0.1, -0.1, 0.2, 0],
    "mean": [0.3, 0, -0.2, 0.1],
    "variance": [1, 0.5, 2, 3],
}


@trap
def batch_norm_training():
    """Traps: BatchNormalization left in training mode normalises by its own batch.

    Its running statistics are further outputs of the node that no graph output uses.
    """
    g = Graph()
    g.op(
        "BatchNormalization",
        "x",
        *(g.const(np.array(v, np.float32)) for v in BATCH_NORM.values()),
        outputs=["y", "running_mean", "running_var"],
        training_mode=1,
    )
    return g.model(
        "batch_norm_training", [("x", T.FLOAT, ["batch", 4])], [("y", T.FLOAT, ["batch", 4])]
    )


@sample
def sample_batch_norm_training():
    x = weights("x", 5, 4)
    y = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    return {"x": x}, {"y": (y * BATCH_NORM["scale"] + BATCH_NORM["bias"]).astype(np.float32)}


@trap
def random_noise():
    """Traps: two runs of the same rows differ, so no comparison of runs means anything."""
    g = Graph()
    g.op("Add", "x", g.op("RandomNormalLike", "x", scale=0.01), out="y")
    return g.model("random_noise", [("x", T.FLOAT, ["batch", 4])], [("y", T.FLOAT, ["batch", 4])])


@sample
def sample_random_noise():
    return {"x": weights("x", 3, 4)}, None


@trap
def mean_centred():
    """Traps: trusting a list of operators. None here is suspect, yet every row sees every other."""
    g = Graph()
    g.op("Sub", "x", g.op("ReduceMean", "x", axes=[0], keepdims=1), out="y")
    return g.model("mean_centred", [("x", T.FLOAT, ["batch", 6])], [("y", T.FLOAT, ["batch", 6])])


@sample
def sample_mean_centred():
    x = weights("x", 5, 6)
    return {"x": x}, {"y": x - x.mean(axis=0, keepdims=True)}


@trap
def inconclusive():
    """Traps: calling silence agreement. Ids below 990 all embed alike, so that invented rows
    cannot be told apart and a self-test proves nothing."""
    g = Graph()
    table = np.zeros((1000, 2), np.float32)
    table[990:] = weights("inconclusive", 10, 2)
    rows = g.op("Gather", g.const(table), "ids", axis=0)
    g.op("ReduceMean", rows, out="pooled", axes=[1], keepdims=0)
    return g.model(
        "inconclusive", [("ids", T.INT64, ["batch", "seq"])], [("pooled", T.FLOAT, ["batch", 2])]
    )


@sample
def sample_inconclusive():
    ids = np.array([[990, 3, 999], [1, 2, 995]], np.int64)
    table = np.zeros((1000, 2), np.float32)
    table[990:] = weights("inconclusive", 10, 2)
    return {"ids": ids}, {"pooled": table[ids].mean(axis=1)}


@trap
def only_seven():
    """Traps: inventing a size for a free axis. The file says any width; only 7 runs."""
    g = Graph()
    seven = g.op("Reshape", "x", g.const(np.array([0, 7], np.int64)))
    g.op("MatMul", seven, g.const(weights("only_seven", 7, 2)), out="y")
    return g.model("only_seven", [("x", T.FLOAT, ["batch", "n"])], [("y", T.FLOAT, ["batch", 2])])


@sample
def sample_only_seven():
    x = weights("x", 3, 7)
    return {"x": x}, {"y": x @ weights("only_seven", 7, 2)}


@trap
def refuses_zeros():
    """Traps: failing a version because it refuses invented warm-up inputs. Ids begin at 1000."""
    g = Graph()
    index = g.op("Sub", "ids", g.const(np.int64(1000)))
    g.op("Gather", g.const(weights("refuses_zeros", 10, 2)), index, out="y", axis=0)
    return g.model(
        "refuses_zeros", [("ids", T.INT64, ["batch", 1])], [("y", T.FLOAT, ["batch", 1, 2])]
    )


@sample
def sample_refuses_zeros():
    ids = np.array([[1000], [1009]], np.int64)
    return {"ids": ids}, {"y": weights("refuses_zeros", 10, 2)[ids - 1000]}


ENCODER = {"hidden": 32, "heads": 4, "layers": 2, "inner": 64, "vocabulary": 100, "positions": 64}


@trap
def encoder():
    """Traps: refusing to batch an ordinary transformer. Rows are independent; batch it."""
    g, e = Graph(), ENCODER
    hidden, width = e["hidden"], e["hidden"] // e["heads"]

    def linear(x, name, inputs, outputs):
        product = g.op("MatMul", x, g.const(weights(f"encoder.{name}", inputs, outputs, scale=0.2)))
        return g.op("Add", product, g.const(weights(f"encoder.{name}.bias", outputs, scale=0.1)))

    def norm(x, out=None):
        ones, zeros = np.ones(hidden, np.float32), np.zeros(hidden, np.float32)
        return g.op(
            "LayerNormalization", x, g.const(ones), g.const(zeros), out=out, axis=-1, epsilon=1e-6
        )

    words = g.const(weights("encoder.words", e["vocabulary"], hidden))
    positions = g.const(weights("encoder.positions", e["positions"], hidden))
    zero, one = g.const(np.array([0], np.int64)), g.const(np.array([1], np.int64))
    length = g.op("Slice", g.op("Shape", "input_ids"), one, g.const(np.array([2], np.int64)), zero)
    here = g.op("Slice", positions, zero, length, zero)
    x = norm(g.op("Add", g.op("Gather", words, "input_ids", axis=0), here))

    mask = g.op("Cast", "attention_mask", to=T.FLOAT)
    mask = g.op("Unsqueeze", mask, g.const(np.array([1, 2], np.int64)))
    hide = g.op("Mul", g.op("Sub", g.const(np.float32(1)), mask), g.const(np.float32(-1e4)))
    split = g.const(np.array([0, 0, e["heads"], width], np.int64))
    join = g.const(np.array([0, 0, hidden], np.int64))
    for layer in range(e["layers"]):

        def head(name, perm):
            y = linear(x, f"{layer}.{name}", hidden, hidden)
            return g.op("Transpose", g.op("Reshape", y, split), perm=perm)

        q, v = head("query", [0, 2, 1, 3]), head("value", [0, 2, 1, 3])
        k = head("key", [0, 2, 3, 1])
        scores = g.op("Mul", g.op("MatMul", q, k), g.const(np.float32(width**-0.5)))
        share = g.op("Softmax", g.op("Add", scores, hide), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", share, v), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, join)
        x = norm(g.op("Add", linear(mixed, f"{layer}.out", hidden, hidden), x))
        wide = linear(x, f"{layer}.up", hidden, e["inner"])
        bend = g.op("Erf", g.op("Mul", wide, g.const(np.float32(0.5**0.5))))
        gelu = g.op("Mul", wide, g.op("Add", bend, g.const(np.float32(1))))
        gelu = g.op("Mul", gelu, g.const(np.float32(0.5)))
        narrow = linear(gelu, f"{layer}.down", e["inner"], hidden)
        last = layer == e["layers"] - 1
        x = norm(g.op("Add", narrow, x), out="last_hidden_state" if last else None)
    return g.model(
        "encoder",
        [(n, T.INT64, ["batch", "seq"]) for n in ("input_ids", "attention_mask")],
        [("last_hidden_state", T.FLOAT, ["batch", "seq", hidden])],
    )


@sample
def sample_encoder():
    ids = rng("ids").integers(0, ENCODER["vocabulary"], (3, 9))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, None


@trap
def fixed_batch():
    """Traps: batching, or inventing 2 rows for, a model whose every axis is fixed."""
    g = Graph()
    flat = g.op("Flatten", g.op("GlobalAveragePool", "image"), axis=1)
    g.op("MatMul", flat, g.const(weights("fixed_batch", 3, 2)), out="y")
    return g.model("fixed_batch", [("image", T.FLOAT, [1, 3, 4, 4])], [("y", T.FLOAT, [1, 2])])


@sample
def sample_fixed_batch():
    x = weights("x", 1, 3, 4, 4)
    return {"image": x}, {"y": x.mean(axis=(2, 3)) @ weights("fixed_batch", 3, 2)}


@trap
def reverse_lstm():
    """Traps: an engine that answers wrongly without an error. tract runs reverse LSTMs forwards,
    so it must refuse this file; time leads, so nobody may batch it."""
    g = Graph()
    hidden = 3
    g.op(
        "LSTM",
        "sequence",
        g.const(weights("reverse_lstm.w", 1, 4 * hidden, 4)),
        g.const(weights("reverse_lstm.r", 1, 4 * hidden, hidden)),
        out="y",
        direction="reverse",
        hidden_size=hidden,
    )
    return g.model(
        "reverse_lstm",
        [("sequence", T.FLOAT, ["seq", "batch", 4])],
        [("y", T.FLOAT, ["seq", 1, "batch", hidden])],
    )


@sample
def sample_reverse_lstm():
    x, hidden = weights("x", 5, 2, 4), 3
    w, r = weights("reverse_lstm.w", 12, 4), weights("reverse_lstm.r", 12, 3)
    h, c, y = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((5, 1, 2, hidden))
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    for t in reversed(range(5)):
        i, o, f, cell = np.split(x[t] @ w.T + h @ r.T, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(cell)
        h = sigmoid(o) * np.tanh(c)
        y[t, 0] = h
    return {"sequence": x}, {"y": y}


# --- datatypes --------------------------------------------------------------------------------

DTYPES = {
    "bytes": (T.STRING, np.object_),
    "fp16": (T.FLOAT16, np.float16),
    "bf16": (T.BFLOAT16, None),
    "fp32": (T.FLOAT, np.float32),
    "fp64": (T.DOUBLE, np.float64),
    "bool": (T.BOOL, np.bool_),
    "int8": (T.INT8, np.int8),
    "int16": (T.INT16, np.int16),
    "int32": (T.INT32, np.int32),
    "int64": (T.INT64, np.int64),
    "uint8": (T.UINT8, np.uint8),
    "uint16": (T.UINT16, np.uint16),
    "uint32": (T.UINT32, np.uint32),
    "uint64": (T.UINT64, np.uint64),
}


def add_identity(suffix, onnx_type, numpy_type):
    """Traps: a datatype lost, widened or misread between the wire and the engine."""
    name = f"identity_{suffix}"

    def build():
        g = Graph()
        g.op("Identity", "x", out="y")
        return g.model(name, [("x", onnx_type, ["batch", "n"])], [("y", onnx_type, ["batch", "n"])])

    def example():
        if numpy_type is np.object_:
            x = np.array([["", "a", "\u00e9\u4e16"], ["b\nc", "d", "e"]], np.object_)
        elif numpy_type is None:  # BF16: numpy has none; run_bf16 passes the bits.
            x = np.array([[0x3F80, 0xBF80, 0x0000], [0x7F80, 0x4049, 0x8000]], np.uint16)
        elif numpy_type is np.bool_:
            x = np.array([[True, False, True], [False, False, True]])
        elif np.issubdtype(numpy_type, np.integer):
            limits = np.iinfo(numpy_type)
            x = np.array([[0, 1, limits.max], [limits.min, 2, 3]], numpy_type)
        else:
            x = np.array([[0, -1.5, 2.25], [np.finfo(numpy_type).max, 0.1, -0.0]], numpy_type)
        return {"x": x}, {"y": x}

    BUILDERS[name], SAMPLES[name] = build, example


for suffix, (onnx_type, numpy_type) in DTYPES.items():
    add_identity(suffix, onnx_type, numpy_type)


# --- plain models that tests send known rows to -----------------------------------------------


@trap
def sum_rows():
    """Traps: inputs or outputs taken by position rather than by name (sum and difference)."""
    g = Graph()
    g.op("Add", "INPUT0", "INPUT1", out="OUTPUT0")
    g.op("Sub", "INPUT0", "INPUT1", out="OUTPUT1")
    return g.model(
        "sum_rows",
        [(n, T.FLOAT, ["batch", 16]) for n in ("INPUT0", "INPUT1")],
        [(n, T.FLOAT, ["batch", 16]) for n in ("OUTPUT0", "OUTPUT1")],
    )


@sample
def sample_sum_rows():
    a, b = weights("a", 2, 16), weights("b", 2, 16)
    return {"INPUT0": a, "INPUT1": b}, {"OUTPUT0": a + b, "OUTPUT1": a - b}


@trap
def sentinel():
    """Traps: one caller's rows in another's answer. y = 2x + 1, exact in FP32 for small integers."""
    g = Graph()
    double = g.op("MatMul", "x", g.const(2 * np.eye(8, dtype=np.float32)))
    g.op("Add", double, g.const(np.ones(8, np.float32)), out="y")
    return g.model("sentinel", [("x", T.FLOAT, ["batch", 8])], [("y", T.FLOAT, ["batch", 8])])


@sample
def sample_sentinel():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    return {"x": x}, {"y": 2 * x + 1}


@trap
def gather():
    """Traps: one bad index failing its neighbours, or reading out of bounds. Rows are 0 to 9."""
    g = Graph()
    g.op("Gather", g.const(weights("gather", 10, 4)), "ids", out="embedding", axis=0)
    return g.model(
        "gather", [("ids", T.INT64, ["batch", 1])], [("embedding", T.FLOAT, ["batch", 1, 4])]
    )


@sample
def sample_gather():
    ids = np.array([[0], [9], [4]], np.int64)
    return {"ids": ids}, {"embedding": weights("gather", 10, 4)[ids]}


@trap
def slow():
    """Traps: deadlines and departed callers behind a long run. Time grows with `steps`."""
    body = Graph()
    body.op("Identity", "go_in", out="go_out")
    turned = body.op("MatMul", "state_in", "turn")
    body.op("Tanh", turned, out="state_out")
    loop = helper.make_graph(
        body.nodes,
        "step",
        [info("i", T.INT64, []), info("go_in", T.BOOL, []), info("state_in", T.FLOAT, [64, 64])],
        [info("go_out", T.BOOL, []), info("state_out", T.FLOAT, [64, 64])],
    )
    g = Graph()
    g.const(weights("slow.turn", 64, 64, scale=0.2), "turn")
    start = g.const(weights("slow.start", 64, 64))
    end = g.op("Loop", "steps", g.const(np.bool_(True)), start, body=loop)
    g.op("ReduceMean", end, out="mean", axes=[0, 1], keepdims=0)
    return g.model("slow", [("steps", T.INT64, [])], [("mean", T.FLOAT, [])])


@sample
def sample_slow():
    return {"steps": np.array(10, np.int64)}, None


# --- output kinds: what the monitor must infer --------------------------------------------------


@trap
def zipmap():
    """Traps: an output that is no tensor (a sequence of maps). Serve the label, omit the map."""
    g = Graph()
    classes = [0, 1, 2]
    _, scores = g.op(
        "LinearClassifier",
        "features",
        outputs=["output_label", "scores"],
        domain="ai.onnx.ml",
        coefficients=weights("zipmap", 12).tolist(),
        intercepts=[0.0, 0.1, -0.1],
        classlabels_ints=classes,
        multi_class=1,
        post_transform="SOFTMAX",
    )
    g.op("ZipMap", scores, out="output_probability", domain="ai.onnx.ml", classlabels_int64s=classes)
    model = g.model(
        "zipmap",
        [("features", T.FLOAT, ["batch", 4])],
        [("output_label", T.INT64, ["batch"])],
        ml=True,
    )
    value = helper.make_tensor_type_proto(T.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(T.INT64, value))
    model.graph.output.append(helper.make_value_info("output_probability", maps))
    return model


@sample
def sample_zipmap():
    x = weights("x", 3, 4)
    scores = x @ weights("zipmap", 12).reshape(3, 4).T + [0.0, 0.1, -0.1]
    return {"features": x}, {"output_label": scores.argmax(axis=1)}


def add_head(name, outputs, kind):
    """Traps: mistaking logits for values, or probabilities for logits."""

    def build():
        g = Graph()
        w, b = weights(f"{name}.w", 4, outputs), weights(f"{name}.b", outputs)
        g.op("Gemm", "x", g.const(w), g.const(b), out="y" if kind else "logits")
        if kind:
            g.nodes[-1].output[0] = "scores"
            g.op(kind, "scores", out="y", **({"axis": -1} if kind == "Softmax" else {}))
        output = "y" if kind else "logits"
        return g.model(
            name, [("x", T.FLOAT, ["batch", 4])], [(output, T.FLOAT, ["batch", outputs])]
        )

    def example():
        x = weights("x", 5, 4)
        scores = x @ weights(f"{name}.w", 4, outputs) + weights(f"{name}.b", outputs)
        if kind == "Softmax":
            e = np.exp(scores)
            return {"x": x}, {"y": e / e.sum(axis=1, keepdims=True)}
        if kind == "Sigmoid":
            return {"x": x}, {"y": 1 / (1 + np.exp(-scores))}
        return {"x": x}, {"logits": scores}

    BUILDERS[name], SAMPLES[name] = build, example


add_head("logits", 3, None)
add_head("softmaxed", 3, "Softmax")
add_head("sigmoid", 1, "Sigmoid")


@trap
def nan_maker():
    """Traps: NaN and infinity in an answer. y = log x: negative gives NaN, zero gives -inf."""
    g = Graph()
    g.op("Log", "x", out="y")
    return g.model("nan_maker", [("x", T.FLOAT, ["batch", 4])], [("y", T.FLOAT, ["batch", 4])])


@sample
def sample_nan_maker():
    x = np.array([[1, 2, 0, -1], [1, 1, 1, 1]], np.float32)
    with np.errstate(all="ignore"):
        return {"x": x}, {"y": np.log(x)}


# --- files ----------------------------------------------------------------------------------------


def external_model(name, location, length):
    """y = x W with W kept outside the file, at `location`."""
    g = Graph()
    tensor = T(name="w", data_type=T.FLOAT, dims=[64, 8], data_location=T.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    g.constants.append(tensor)
    g.op("MatMul", "x", "w", out="y")
    return g.model(name, [("x", T.FLOAT, ["batch", 64])], [("y", T.FLOAT, ["batch", 8])])


EXTERNAL_WEIGHTS = ("external", 64, 8)


@sample
def sample_external():
    x = weights("x", 3, 64)
    return {"x": x}, {"y": x @ weights(*EXTERNAL_WEIGHTS)}


def write(path, data):
    assert len(data) < SIZE_LIMIT, f"{path.name}: {len(data)} bytes, limit {SIZE_LIMIT}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def answer(name):
    """(inputs, expected outputs) of a trap's sample, never from the engines under test; None where it is random."""
    inputs, expected = SAMPLES[name]()
    if expected is None and name not in RANDOM:
        model = ReferenceEvaluator(BUILDERS[name]())
        expected = dict(zip(model.output_names, model.run(None, inputs)))
    return inputs, expected


def expectations():
    """What clients send and must get back. Datatypes and infinity have tests of their own: JSON holds neither."""
    told = {}
    for name in SAMPLES:
        inputs, expected = answer(name)
        if expected and not name.startswith("identity_") and name != "nan_maker":
            told[name] = {"inputs": tensors(inputs, float), "outputs": tensors(expected, six_digits)}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in told.items())
    return f"{{\n{rows}\n}}\n".encode()


def six_digits(value):
    """More than the tolerance, and alike on every machine."""
    return float(f"{value:.6g}")


def tensors(arrays, write_float):
    return {name: tensor(np.asarray(array), write_float) for name, array in arrays.items()}


def tensor(array, write_float):
    data = array.flatten().tolist()
    if array.dtype.kind == "f":
        return {"datatype": "FP32", "shape": list(array.shape), "data": [write_float(v) for v in data]}
    return {"datatype": "INT64", "shape": list(array.shape), "data": data}


def serialised(model):
    return model.SerializeToString(deterministic=True)


def make():
    for name, build in BUILDERS.items():
        model = build()
        onnx.checker.check_model(model, full_check=True)
        write(GOOD / name / "1" / "model.onnx", serialised(model))

    write(GOOD / "expected.json", expectations())

    # Traps: reading the model's bytes without its folder.
    data = weights(*EXTERNAL_WEIGHTS).tobytes()
    write(GOOD / "external" / "1" / "weights.bin", data)
    write(
        GOOD / "external" / "1" / "model.onnx",
        serialised(external_model("external", "weights.bin", len(data))),
    )

    # Traps: following a path out of the model's folder. The file is there and would load.
    write(BAD / "secret.bin", data)
    write(
        BAD / "escaping_external" / "1" / "model.onnx",
        serialised(external_model("escaping_external", "../../secret.bin", len(data))),
    )
    # Traps: a file cut short while it was copied.
    write(BAD / "corrupt" / "1" / "model.onnx", serialised(encoder())[:200])
    # Traps: a file that was made but never written.
    write(BAD / "empty" / "1" / "model.onnx", b"")


def check():
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)

    def session(path):
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    unlike = set(SAMPLES) ^ (set(BUILDERS) | {"external"})
    assert not unlike, f"trap without sample, or sample without trap: {sorted(unlike)}"
    for name in SAMPLES:
        inputs, expected = answer(name)
        run = session(GOOD / name / "1" / "model.onnx")
        if name == "identity_bf16":
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(inputs["x"], T.BFLOAT16)
            [out] = run.run_with_ort_values(["y"], {"x": value})
            assert out.data_type() == "tensor(bfloat16)", out.data_type()
            print(f"ok  {name}")
            continue
        got = dict(zip([o.name for o in run.get_outputs()], run.run(None, inputs)))
        for output, want in (expected or {}).items():
            if want.dtype.kind == "f":
                np.testing.assert_allclose(got[output], want, rtol=1e-4, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(got[output], want, err_msg=name)
        shapes = {k: getattr(v, "shape", type(v).__name__) for k, v in got.items()}
        print(f"ok  {name}  {shapes}")

    refused("corrupt", lambda: session(BAD / "corrupt" / "1" / "model.onnx"))
    refused("empty", lambda: session(BAD / "empty" / "1" / "model.onnx"))
    refused("escaping_external", lambda: session(BAD / "escaping_external" / "1" / "model.onnx"))
    ids = np.zeros((1, 1), np.int64)
    refused("refuses_zeros on zeros", lambda: session(GOOD / "refuses_zeros/1/model.onnx").run(None, {"ids": ids}))
    refused("gather at 10", lambda: session(GOOD / "gather/1/model.onnx").run(None, {"ids": ids + 10}))
    x = np.zeros((2, 3), np.float32)
    refused("only_seven at 3", lambda: session(GOOD / "only_seven/1/model.onnx").run(None, {"x": x}))


def refused(what, attempt):
    try:
        attempt()
    except Exception as error:  # noqa: BLE001 - the engine's own classes vary with its version
        print(f"ok  {what}: refused: {str(error).splitlines()[0][:110]}")
    else:
        raise AssertionError(f"{what}: was not refused")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run the committed files in onnxruntime")
    check() if parser.parse_args().check else make()
