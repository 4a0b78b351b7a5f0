"""Twins of example models as safetensors: the same weights under PyTorch's names, and the layers that compute with them."""

import json
from dataclasses import dataclass

import numpy as np

from publish import Version, expected_json

DATATYPES = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}


@dataclass
class Twin:
    """`layers` are `torch.nn`'s classes with their arguments, in order; `tensors` what `state_dict` would call them."""

    name: str
    of: Version
    layers: list[dict]
    tensors: dict[str, np.ndarray]


def safetensors(tensors) -> bytes:
    """The format's layout: the header's length, the header, padded with spaces to eight bytes, and the tensors' bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[key] = {"dtype": DATATYPES[array.dtype], "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def digits_twin(version, params) -> Twin:
    """The convolutional network. Dividing the pixels by 16, a power of two, is exact in the first kernel, too."""
    p = {key: np.asarray(array, np.float32) for key, array in params.items()}
    layers = [
        {"type": "Unflatten", "dim": 1, "unflattened_size": [1, 8, 8]},
        {"type": "Conv2d", "out_channels": 16, "kernel_size": 3, "padding": 1},
        {"type": "ReLU"},
        {"type": "Conv2d", "out_channels": 32, "kernel_size": 3, "padding": 1},
        {"type": "ReLU"},
        {"type": "MaxPool2d", "kernel_size": 2},
        {"type": "Flatten"},
        {"type": "Linear", "out_features": 64},
        {"type": "ReLU"},
        {"type": "Linear", "out_features": 10},
        {"type": "Softmax", "dim": 1},
    ]
    weights = {1: p["kernel0"] / 16, 3: p["kernel1"], 7: p["weight2"].T, 9: p["weight3"].T}
    tensors = {}
    for i, (place, weight) in enumerate(weights.items()):
        tensors |= {f"{place}.weight": weight, f"{place}.bias": p[f"bias{i}"]}
    return Twin("digits_st", version, layers, tensors)


def tumor_twin(version, mean, scale, layer) -> Twin:
    """Standardising is a batch norm without weights, by the training rows' mean and variance."""
    layers = [{"type": "BatchNorm1d", "affine": False, "eps": 0.0}, {"type": "Linear", "out_features": 2}, {"type": "Softmax", "dim": 1}]
    weight, bias = layer
    tensors = {"0.running_mean": np.float32(mean), "0.running_var": np.float32(scale**2), "0.num_batches_tracked": np.array(1, np.int64)}
    return Twin("tumor_st", version, layers, tensors | {"1.weight": np.float32(weight).T, "1.bias": np.float32(bias)})


def toml(value) -> str:
    return json.dumps(value)  # Of text, numbers, lists and booleans TOML thinks as JSON does.


def model_toml(twin) -> str:
    spec = twin.of.model.graph.input[0]
    width, output = spec.type.tensor_type.shape.dim[1].dim_value, twin.of.model.graph.output[0].name
    lines = ['labels = "labels.txt"', f'input = {{ name = {toml(spec.name)}, datatype = "FP32", shape = [-1, {width}] }}', f"output = {toml(output)}"]
    for layer in twin.layers:
        lines += ["", "[[layers]]", *(f"{key} = {toml(value)}" for key, value in layer.items())]
    return "\n".join(lines) + "\n"


def twin_files(twin) -> dict[str, bytes | str]:
    files = {f"{twin.name}/labels.txt": "\n".join(twin.of.data.labels) + "\n", f"{twin.name}/model.toml": model_toml(twin)}
    return files | {f"{twin.name}/1/model.safetensors": safetensors(twin.tensors), f"{twin.name}/1/expected.json": expected_json(twin.of)}


def twin_row(twin) -> list[str]:
    """Its line in the registry's README."""
    size = len(safetensors(twin.tensors)) / 1024
    return [f"[{twin.name}/1]({twin.name}/README.md)", f"{twin.of.folder} as safetensors", twin.of.quality, f"{size:.1f} KiB", "Apache-2.0"]
