"""The Open Inference Protocol's JSON, as far as somebody goes who serves a model by hand: no checks, no extensions."""

import os
import pathlib

import numpy as np
import onnxruntime

NAMES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}
TYPES = {"FP32": np.float32, "INT64": np.int64}


def sessions(registry):
    """By model. One thread a run: the servers here run as many at once as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    paths = sorted(pathlib.Path(registry).glob("*/1/model.onnx"))
    return {path.parts[-3]: session(path, options) for path in paths}


def session(path, options):
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def described(values):
    """Dimensions of any extent are -1."""
    extent = lambda dim: dim if isinstance(dim, int) else -1  # noqa: E731
    return [{"name": v.name, "datatype": NAMES[v.type], "shape": [extent(d) for d in v.shape]} for v in values]


def metadata(name, session):
    inputs, outputs = described(session.get_inputs()), described(session.get_outputs())
    return {"name": name, "versions": ["1"], "platform": "onnxruntime", "inputs": inputs, "outputs": outputs}


def arrays(body):
    return {i["name"]: np.array(i["data"], TYPES[i["datatype"]]).reshape(i["shape"]) for i in body["inputs"]}


def answer(name, session, values):
    outputs = [
        described([output])[0] | {"shape": list(value.shape), "data": value.ravel().tolist()}
        for output, value in zip(session.get_outputs(), values)
    ]
    return {"model_name": name, "model_version": "1", "outputs": outputs}


def cores():
    return len(os.sched_getaffinity(0))
