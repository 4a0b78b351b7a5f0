"""Version 2 of digits: a small convolutional network, trained with JAX, and its ONNX graph."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from onnx import ModelProto, TensorProto
from onnx.helper import make_node

from graphs import onnx_model

Params = dict[str, np.ndarray]


def initial_params(rng) -> Params:
    def he(*shape, fan_in):
        return (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    kernels = {"kernel0": he(16, 1, 3, 3, fan_in=9), "kernel1": he(32, 16, 3, 3, fan_in=144)}
    weights = {"weight2": he(512, 64, fan_in=512), "weight3": he(64, 10, fan_in=64)}
    return kernels | weights | {f"bias{i}": np.zeros(n, np.float32) for i, n in enumerate((16, 32, 64, 10))}


def cnn_logits(p, image):
    """Images [n, 64] of pixels 0 to 16 to logits [n, 10]: two 3x3 convolutions, 2x2 max-pooling, two dense layers."""
    hidden = image.reshape(-1, 1, 8, 8) / 16
    for i in range(2):
        hidden = jax.nn.relu(jax.lax.conv(hidden, p[f"kernel{i}"], (1, 1), "SAME") + p[f"bias{i}"][:, None, None])
    pooled = hidden.reshape(-1, 32, 4, 2, 4, 2).max(axis=(3, 5)).reshape(-1, 512)
    return jax.nn.relu(pooled @ p["weight2"] + p["bias2"]) @ p["weight3"] + p["bias3"]


def cross_entropy(p, image, digit):
    return -jnp.take_along_axis(jax.nn.log_softmax(cnn_logits(p, image)), digit[:, None], axis=1).mean()


@jax.jit
def adam_step(p, first, second, step, image, digit):
    """Kingma and Ba, "Adam" (2015), algorithm 1 in the order of its section 2, with the default constants."""
    gradient = jax.grad(cross_entropy)(p, image, digit)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
    rate = 1e-3 * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), p, first, second), first, second


def train_cnn(image, digit, seed, epochs=40, batch=64) -> Params:
    rng = np.random.default_rng(seed)
    p = initial_params(rng)
    first = second = jax.tree.map(np.zeros_like, p)
    for step in range(epochs * (len(image) // batch)):
        if step % (len(image) // batch) == 0:
            order = rng.permutation(len(image))
        rows, order = order[:batch], order[batch:]
        p, first, second = adam_step(p, first, second, step + 1.0, image[rows], digit[rows])
    return jax.tree.map(np.asarray, p)


def cnn_model(params) -> ModelProto:
    """The graph of `cnn_logits` with Softmax after it."""
    conv = partial(make_node, "Conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    nodes = [
        make_node("Reshape", ["image", "planes"], ["raw"]),
        make_node("Div", ["raw", "white"], ["scaled"]),
        conv(["scaled", "kernel0", "bias0"], ["conv0"]),
        make_node("Relu", ["conv0"], ["hidden0"]),
        conv(["hidden0", "kernel1", "bias1"], ["conv1"]),
        make_node("Relu", ["conv1"], ["hidden1"]),
        make_node("MaxPool", ["hidden1"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        make_node("Flatten", ["pooled"], ["flat"], axis=1),
        make_node("Gemm", ["flat", "weight2", "bias2"], ["sum2"]),
        make_node("Relu", ["sum2"], ["hidden2"]),
        make_node("Gemm", ["hidden2", "weight3", "bias3"], ["logits"]),
        make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    constants = {"planes": np.array([0, 1, 8, 8]), "white": np.float32(16)}
    signature = {"image": (TensorProto.FLOAT, [64])}, {"probabilities": (TensorProto.FLOAT, [10])}
    return onnx_model("digits", nodes, constants | params, *signature)
