"""The ONNX project's node tests: where they come from, what is in them, and what ONNX Runtime makes of them in process.

A case is one model, one set of inputs and the outputs that the ONNX project expects of them.
"""

import collections
import ctypes
import dataclasses
import functools
import math
import pathlib
import shutil

import numpy as np
import onnx
import onnxruntime
from ml_dtypes import bfloat16
from onnx import TensorProto, numpy_helper
from support import REPOSITORY, fetched_wheel, to_bytes

FOLDER = REPOSITORY / "target/conformance"
WHEEL = pathlib.Path(__file__).with_suffix(".txt")
# Any wheel of the release would do; this one is named so that every machine and every Python fetches the same.
PLATFORM = ["--only-binary=:all:", "--implementation=cp", "--python-version=3.12", "--platform=manylinux2014_x86_64"]
INSIDE = "onnx/backend/test/data/node/"

# The ONNX project's own: `onnx.backend.test.runner`.
RELATIVE, ABSOLUTE = 1e-3, 1e-7

CARRIED = {
    TensorProto.BOOL,
    TensorProto.UINT8,
    TensorProto.UINT16,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.STRING,
}


def unpacked():
    """The folder that has one folder per case."""
    folder = FOLDER / "node"
    if not folder.exists():
        with fetched_wheel(WHEEL, FOLDER, *PLATFORM) as archive:
            partial = FOLDER / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            archive.extractall(partial, [name for name in archive.namelist() if name.startswith(INSIDE)])
            # Complete once it is named.
            (partial / INSIDE).rename(folder)
            shutil.rmtree(partial)
    return folder


@dataclasses.dataclass
class Case:
    name: str
    folder: pathlib.Path

    @property
    def model(self):
        return self.folder / "model.onnx"

    @functools.cached_property
    def graph(self):
        return onnx.load(self.model).graph

    @functools.cached_property
    def not_carried(self):
        """Why the protocol has no words for an input or output: the first such type; None where it can say them all."""
        kinds = [kind(value) for value in [*self.graph.input, *self.graph.output]]
        return next((told for carried, told in kinds if not carried), None)

    def tensors(self, side):
        """{name: array} of the `input`s or the `output`s."""
        values = enumerate(getattr(self.graph, side))
        return {v.name: tensor(self.folder / f"test_data_set_0/{side}_{n}.pb", v) for n, v in values}

    inputs = functools.cached_property(lambda self: self.tensors("input"))
    outputs = functools.cached_property(lambda self: self.tensors("output"))


def cases():
    found = [Case(folder.name, folder) for folder in sorted(unpacked().iterdir())]
    # What this file takes for granted of them all.
    assert all(len(list(case.folder.glob("test_data_set_*"))) == 1 and not case.graph.initializer for case in found)
    return found


def kind(value):
    """Whether the protocol can carry it, and what it is."""
    what = value.type.WhichOneof("value")
    if what != "tensor_type":
        return False, what.removesuffix("_type")
    element = value.type.tensor_type.elem_type
    return element in CARRIED, TensorProto.DataType.Name(element)


def tensor(file, value):
    stored = TensorProto()
    stored.ParseFromString(file.read_bytes())
    array = numpy_helper.to_array(stored)
    # BF16 is stored as its bits, under the name UINT16.
    if value.type.tensor_type.elem_type == TensorProto.BFLOAT16 and array.dtype == np.uint16:
        array = array.view(bfloat16)
    return array


def difference(got, want):
    """What is wrong with the outputs, {name: array}; None where nothing is."""
    if list(got) != list(want):
        return f"outputs {list(got)}, expected {list(want)}"
    for name, expected in want.items():
        found = got[name]
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return f"{name}: {found.dtype}{list(found.shape)}, expected {expected.dtype}{list(expected.shape)}"
        if expected.dtype == np.object_:
            wrong = np.array([to_bytes(a) != to_bytes(b) for a, b in zip(found.flat, expected.flat)])
        else:
            a, b = (x.astype(np.float32) if x.dtype == bfloat16 else x for x in (found, expected))
            wrong = ~np.isclose(a, b, RELATIVE, ABSOLUTE, equal_nan=True)
        if wrong.any():
            at = int(np.flatnonzero(wrong.ravel())[0])
            told = f"{found.flat[at]}, expected {expected.flat[at]}"
            return f"{name}: {int(wrong.sum())} of {wrong.size} elements differ: {told}"
    return None


def in_process(case):
    """What is wrong with the answers of Python's onnxruntime; None where nothing is."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
        answers = answered(session, case)
    except Exception as error:  # each of its error codes is a class of its own, without a base
        return f"{type(error).__name__}: {error}"
    return difference(answers, case.outputs)


def answered(session, case):
    names = [output.name for output in session.get_outputs()]
    if not any(array.dtype == bfloat16 for array in [*case.inputs.values(), *case.outputs.values()]):
        return dict(zip(names, session.run(names, case.inputs)))
    # onnxruntime's Python knows no numpy type for BF16, only bits.
    feeds = {name: ort_value(array) for name, array in case.inputs.items()}
    return {name: from_ort_value(value) for name, value in zip(names, session.run_with_ort_values(names, feeds))}


def ort_value(array):
    if array.dtype == bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def from_ort_value(value):
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    bits = ctypes.string_at(value.data_ptr(), math.prod(shape) * np.dtype(bfloat16).itemsize)
    return np.frombuffer(bits, bfloat16).reshape(shape)
