"""Writes what PyTorch and transformers answer, for the tests of safetensors models.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python make.py

`layers.json` holds small `torch.nn.Sequential`s: their `[[layers]]`, tensors, an input and PyTorch's output. `encoders/`
is a registry of tiny Hugging Face folders with random weights and `expected.json`, answers of transformers. Seeds are fixed.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
    __version__ as transformers_version,
)

HERE = pathlib.Path(__file__).resolve().parent
TOLERANCE = {"absolute": 2e-6, "relative": 2e-5}
SIZE_LIMIT = 100_000

# name, shape of the input, layers as torch.nn's classes with their arguments
ACTIVATIONS = [
    ("ReLU", {}), ("ReLU6", {}), ("LeakyReLU", {}), ("LeakyReLU", {"negative_slope": 0.2}), ("ELU", {}), ("ELU", {"alpha": 0.5}),
    ("GELU", {}), ("GELU", {"approximate": "tanh"}), ("SiLU", {}), ("Mish", {}), ("Sigmoid", {}), ("Hardsigmoid", {}),
    ("Hardswish", {}), ("Tanh", {}), ("Softplus", {}), ("Identity", {}), ("Dropout", {"p": 0.5}), ("Dropout2d", {}),
]  # fmt: skip
LAYERS = [
    ("linear", [3, 4], [("Linear", {"in_features": 4, "out_features": 3})]),
    ("linear without bias", [2, 3, 4], [("Linear", {"in_features": 4, "out_features": 2, "bias": False})]),
    ("conv2d", [2, 3, 6, 7], [("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3})]),
    ("conv2d padded", [1, 2, 6, 7], [("Conv2d", {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "stride": 2})]),
    ("conv2d oblong", [2, 2, 6, 7], [("Conv2d", {"in_channels": 2, "out_channels": 3, "kernel_size": [3, 2], "padding": [2, 1], "stride": [2, 1], "bias": False})]),
    ("conv2d dilated", [1, 2, 8, 7], [("Conv2d", {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "dilation": 3})]),
    ("conv2d same", [1, 2, 5, 6], [("Conv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": [4, 3], "padding": "same"})]),
    ("conv2d valid", [1, 2, 5, 6], [("Conv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": 1, "padding": "valid"})]),
    ("conv2d 1x1 with stride", [2, 3, 5, 6], [("Conv2d", {"in_channels": 3, "out_channels": 2, "kernel_size": 1, "stride": 2, "padding": 1})]),
    ("conv2d grouped", [2, 4, 5, 5], [("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2})]),
    ("conv2d depthwise", [1, 4, 5, 5], [("Conv2d", {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1})]),
    ("conv1d", [2, 3, 9], [("Conv1d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2})]),
    ("conv1d same", [1, 2, 7], [("Conv1d", {"in_channels": 2, "out_channels": 4, "kernel_size": 4, "padding": "same", "groups": 2})]),
    ("batchnorm1d", [3, 4], [("BatchNorm1d", {"num_features": 4})]),
    ("batchnorm1d of sequences", [2, 4, 3], [("BatchNorm1d", {"num_features": 4, "eps": 0.01})]),
    ("batchnorm2d", [2, 3, 2, 2], [("BatchNorm2d", {"num_features": 3, "affine": False})]),
    ("layernorm", [3, 5], [("LayerNorm", {"normalized_shape": 5})]),
    ("layernorm of two axes", [2, 3, 4], [("LayerNorm", {"normalized_shape": [3, 4], "eps": 0.001, "bias": False})]),
    ("layernorm plain", [2, 4], [("LayerNorm", {"normalized_shape": [4], "elementwise_affine": False})]),
    ("maxpool2d", [2, 2, 5, 7], [("MaxPool2d", {"kernel_size": 2})]),
    ("maxpool2d padded", [1, 2, 6, 7], [("MaxPool2d", {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]})]),
    ("maxpool2d ceil", [1, 2, 6, 7], [("MaxPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True})]),
    ("maxpool1d", [2, 2, 7], [("MaxPool1d", {"kernel_size": 3, "stride": 2, "padding": 1})]),
    ("avgpool2d", [2, 2, 4, 6], [("AvgPool2d", {"kernel_size": [2, 3]})]),
    ("avgpool2d padded", [1, 2, 6, 7], [("AvgPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True})]),
    ("avgpool2d without padding", [1, 2, 6, 7], [("AvgPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False})]),
    ("avgpool1d", [2, 2, 7], [("AvgPool1d", {"kernel_size": 2, "padding": 1})]),
    ("adaptive average 1d", [2, 3, 5], [("AdaptiveAvgPool1d", {"output_size": 1})]),
    ("adaptive average 2d", [2, 3, 4, 5], [("AdaptiveAvgPool2d", {"output_size": [1, 1]})]),
    ("embedding", [2, 5], [("Embedding", {"num_embeddings": 7, "embedding_dim": 3, "padding_idx": 0})]),
    ("flatten", [2, 3, 2, 2], [("Flatten", {})]),
    ("flatten some", [2, 3, 2, 2], [("Flatten", {"start_dim": -3, "end_dim": 2})]),
    ("unflatten", [2, 12], [("Unflatten", {"dim": 1, "unflattened_size": [3, 4]})]),
    ("softmax", [3, 4], [("Softmax", {"dim": -1})]),
    ("softmax of channels", [2, 3, 2], [("Softmax", {"dim": 1})]),
    ("logsoftmax", [3, 4], [("LogSoftmax", {"dim": 1})]),
    *[(" ".join([kind.lower(), *map(str, arguments.values())]), [2, 3, 2, 2], [(kind, arguments)]) for kind, arguments in ACTIVATIONS],
    ("a convolutional classifier", [3, 36], [
        ("Unflatten", {"dim": 1, "unflattened_size": [1, 6, 6]}),
        ("Conv2d", {"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1}),
        ("BatchNorm2d", {"num_features": 4}), ("ReLU", {}), ("MaxPool2d", {"kernel_size": 2}), ("Dropout", {}), ("Flatten", {}),
        ("Linear", {"in_features": 36, "out_features": 5}), ("Softmax", {"dim": 1}),
    ]),
    ("a bag of words", [3, 6], [
        ("Embedding", {"num_embeddings": 9, "embedding_dim": 4}), ("Flatten", {}),
        ("Linear", {"in_features": 24, "out_features": 8}), ("LayerNorm", {"normalized_shape": 8}), ("GELU", {}),
        ("Linear", {"in_features": 8, "out_features": 1}), ("Sigmoid", {}),
    ]),
]  # fmt: skip
# What may be left out, since it follows from the layer before: every second case does.
IMPLIED = {"in_features", "in_channels", "num_features"}


def listed(tensor):
    return {"shape": list(tensor.shape), "data": [round(x, 9) if isinstance(x, float) else x for x in tensor.flatten().tolist()]}


def build(kind, arguments):
    return getattr(nn, kind)(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})


def layer_case(number, name, shape, layers):
    torch.manual_seed(number)
    module = nn.Sequential(*[build(*layer) for layer in layers])
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_((torch.rand(tensor.shape) + 0.5 if key.endswith("running_var") else torch.randn(tensor.shape)).mul(1024).round().div(1024))
    module.eval()
    embeds = layers[0][0] == "Embedding"
    x = torch.randint(0, layers[0][1]["num_embeddings"], shape) if embeds else (3 * torch.randn(shape)).mul(64).round().div(64)
    with torch.no_grad():
        y = module(x)
    stated = [{"type": kind} | {k: v for k, v in arguments.items() if number % 2 or k not in IMPLIED} for kind, arguments in layers]
    tensors = {key: listed(tensor) for key, tensor in module.state_dict().items()}
    return {"name": name, "layers": stated, "tensors": tensors, "input": listed(x), "output": listed(y)}


def tokens(rows, pad):
    """Ids and mask of rows of unequal length, padded to the longest."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=20)
DISTIL = dict(vocab_size=32, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=20)
NAMES = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


def mean_pooled(states, mask):
    kept = mask.unsqueeze(2).float()
    return nn.functional.normalize((states * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


ENCODERS = [
    # folder, model, its configuration, what is asked of it
    ("bert", BertModel, BertConfig(**SIZES), "hidden"),
    ("bert_classes", BertForSequenceClassification, BertConfig(**SIZES, **NAMES, hidden_act="gelu_new"), "logits"),
    ("bert_sentences", BertModel, BertConfig(**SIZES), "mean"),
    ("distilbert", DistilBertModel, DistilBertConfig(**DISTIL), "hidden"),
    ("distilbert_classes", DistilBertForSequenceClassification, DistilBertConfig(**DISTIL, **NAMES), "logits"),
    ("roberta", RobertaModel, RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1), "hidden"),
    ("roberta_classes", RobertaForSequenceClassification, RobertaConfig(**SIZES, **NAMES, type_vocab_size=1, pad_token_id=1), "logits"),
    ("xlm_roberta_cls", XLMRobertaModel, XLMRobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1), "cls"),
]


def encoder_outputs(model, ids, mask, ending):
    with torch.no_grad():
        answer = model(input_ids=ids, attention_mask=mask)
    if ending == "logits":
        return {"logits": answer.logits}
    states = answer.last_hidden_state
    pooled = {"hidden": {}, "mean": {"sentence_embedding": mean_pooled(states, mask)}, "cls": {"sentence_embedding": states[:, 0]}}
    return {"last_hidden_state": states} | pooled[ending]


def golden(tensor):
    return {"datatype": "INT64" if tensor.dtype == torch.int64 else "FP32"} | listed(tensor)


def encoder_files(number, name, kind, config, ending):
    torch.manual_seed(number)
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.2 * torch.randn(parameter.shape)
            parameter.copy_((1 + spread if "norm" in key.lower() and key.endswith("weight") else 2 * spread).mul(256).round().div(256))
    pad = config.pad_token_id or 0
    cases = []
    for title, rows in [("one row", [[5, 7, 11, 2]]), ("rows of unequal length", [[3, 9, 30, 31, 8, 2, 6], [4, 12], [29, 28, 27, 26]])]:
        ids, mask = tokens(rows, pad)
        inputs = {"input_ids": golden(ids), "attention_mask": golden(mask)}
        answers = encoder_outputs(model, ids, mask, ending)
        cases.append({"name": title, "inputs": inputs, "outputs": {name: golden(answer) for name, answer in answers.items()}})
    folder = HERE / "encoders" / name / "1"
    folder.mkdir(parents=True)
    source = f"transformers {transformers_version}"
    lines = ",\n  ".join(json.dumps(case) for case in cases)
    (folder / "expected.json").write_text(f'{{\n "source": {json.dumps(source)},\n "tolerance": {json.dumps(TOLERANCE)},\n "cases": [\n  {lines}\n ]\n}}\n')
    config.architectures = [kind.__name__]
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"transformers_version": transformers_version}, indent=1) + "\n")
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if name == "distilbert":  # Nothing is lost: the weights are multiples of 1/256, and small.
        tensors = {key: tensor.to(torch.float16) for key, tensor in tensors.items()}
    if name == "bert_sentences":
        sentence_files(folder)
        shards(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if ending == "cls":
        (folder.parent / "model.toml").write_text('[encoder]\npooling = "cls"\n')


def sentence_files(folder):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | modes, indent=1) + "\n")


def shards(folder, tensors):
    halves = [{}, {}]
    for i, (key, tensor) in enumerate(sorted(tensors.items())):
        halves[i % 2][key] = tensor
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, half in zip(names, halves):
        save_file(half, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, half in zip(names, halves) for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def main():
    cases = [layer_case(number, *case) for number, case in enumerate(LAYERS)]
    lines = ",\n ".join(json.dumps(case) for case in cases)
    source = f"PyTorch {torch.__version__.split('+')[0]}"
    (HERE / "layers.json").write_text(f'{{"source": {json.dumps(source)}, "cases": [\n {lines}\n]}}\n')
    shutil.rmtree(HERE / "encoders", ignore_errors=True)
    for number, case in enumerate(ENCODERS):
        encoder_files(number, *case)
    for path in HERE.rglob("*"):
        if path.is_file() and path.stat().st_size > SIZE_LIMIT:
            raise SystemExit(f"{path.relative_to(HERE)}: {path.stat().st_size} bytes, expected at most {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
