"""What the example registry publishes of a trained version: its files, checked against ONNX Runtime, goldens and README parts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import onnx
import onnxruntime

ROOT = Path(__file__).parent
TOLERANCE = {"absolute": 1e-5, "relative": 1e-4}
MAX_BYTES = 1 << 20
DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}


@dataclass
class Split:
    """A data set with a quarter of its rows held out. Rows are what a client sends: float32, unscaled."""

    train: np.ndarray
    test: np.ndarray
    train_target: np.ndarray
    test_target: np.ndarray
    labels: list[str]  # Empty for regression.


@dataclass
class Version:
    """One trained version: its ONNX model, and the framework's own answers to compare it with."""

    name: str
    number: int
    model: onnx.ModelProto
    predict: Callable[[np.ndarray], dict[str, np.ndarray]]
    source: str
    recipe: str
    score: float  # Accuracy or R², on the held-out rows.
    quality: str  # The same in words.
    data: Split

    @property
    def folder(self) -> str:
        return f"{self.name}/{self.number}"


def tensor(array) -> dict:
    """OIP's JSON form; a float32 as the shortest decimal that reads back as itself."""
    array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
    return {"datatype": DATATYPES[array.dtype], "shape": list(array.shape), "data": [json.loads(str(value)) for value in array.ravel()]}


def input_name(version) -> str:
    return version.model.graph.input[0].name


def check_engine(version) -> None:
    """Every held-out row through ONNX Runtime, in one batch, against the framework."""
    session = onnxruntime.InferenceSession(version.model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    answers = dict(zip(names, session.run(names, {input_name(version): version.data.test})))
    for name, wanted in version.predict(version.data.test).items():
        where = f"{version.folder} output {name}: ONNX Runtime against {version.source}"
        np.testing.assert_allclose(answers[name], wanted, TOLERANCE["relative"], TOLERANCE["absolute"], err_msg=where)


def cases(version) -> list[dict]:
    """Single rows, rows together (many, so that most weights matter), and the rows where the answer is closest to a tie, which show a changed weight best."""
    answers = version.predict(version.data.test)
    chosen = {"held-out row 0": [0], "held-out row 1": [1], "held-out rows 2 to 4": [2, 3, 4], "held-out rows 5 to 36": [*range(5, 37)]}
    if "probabilities" in answers:
        doubtful = np.argsort(answers["probabilities"].max(axis=1), kind="stable")[:3]
        chosen["the three least certain held-out rows"] = sorted(doubtful.tolist())
    return [
        {
            "name": name,
            "inputs": {input_name(version): tensor(version.data.test[rows])},
            "outputs": {output: tensor(array) for output, array in version.predict(version.data.test[rows]).items()},
        }
        for name, rows in chosen.items()
    ]


def expected_json(version) -> str:
    lines = ",\n  ".join(json.dumps(case) for case in cases(version))
    return f'{{\n "source": {json.dumps(version.source)},\n "tolerance": {json.dumps(TOLERANCE)},\n "cases": [\n  {lines}\n ]\n}}\n'


# Folders


def request(version, row) -> str:
    described = tensor(version.data.test[row : row + 1])
    return json.dumps({"inputs": [{"name": input_name(version), **{key: described[key] for key in ("shape", "datatype", "data")}}]})


def agreed_row(versions) -> int:
    """The first held-out row that every version gets right."""
    data = versions[0].data
    if not data.labels:
        return 0
    wrong = sum(version.predict(data.test)["probabilities"].argmax(axis=1) != data.test_target for version in versions)
    return int(np.flatnonzero(wrong == 0)[0])


def example(versions, row) -> str:
    newest, data = versions[-1], versions[-1].data
    truth = f"`{data.labels[data.test_target[row]]}`" if data.labels else f"{data.test_target[row]:g}"
    answers = ", ".join(f"`{name}` {array[0].round(4).tolist()}" for name, array in newest.predict(data.test[row : row + 1]).items())
    body = f"@models/{newest.name}/sample.json" if newest.name == "digits" else f"'{request(newest, row)}'"
    command = f"curl -s http://localhost:8000/v2/models/{newest.name}/infer -d {body}"
    return f"```sh\n{command}\n```\n\nThis is held-out row {row}, in truth {truth}; {newest.source} gives {answers}."


def table(heads, rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def size(version) -> str:
    return f"{version.model.ByteSize() / 1024:.1f} KiB"


def filled(readme, **parts) -> str:
    """The README's text with what stands between `<!-- part -->` and `<!-- /part -->` replaced."""
    text = readme.read_text()
    for part, content in parts.items():
        text, found = re.subn(rf"(<!-- {part} -->).*?(<!-- /{part} -->)", lambda m: f"{m[1]}\n{content}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{readme.relative_to(ROOT)}: found {found} parts marked {part}, expected 1")
    return text


def overview(versions, more) -> dict[str, str]:
    """The registry's own README; `more` are further lines of its table."""
    rows = [[f"[{v.folder}]({v.name}/README.md)", v.recipe, v.quality, size(v), "Apache-2.0"] for v in versions]
    models = table(["Model", "Kind", "On held-out rows", "Size", "Licence"], [*rows, *more])
    return {"README.md": filled(ROOT / "README.md", models=models)}


def folder_files(versions) -> dict[str, bytes | str]:
    """The files of one model, by their path in the registry, once ONNX Runtime has been found to agree."""
    name, row, labels = versions[0].name, agreed_row(versions), versions[0].data.labels
    measured = table(["Version", "Kind", "On held-out rows", "Size"], [[str(v.number), v.recipe, v.quality, size(v)] for v in versions])
    files = {f"{name}/README.md": filled(ROOT / name / "README.md", measured=measured, example=example(versions, row))}
    for version in versions:
        check_engine(version)
        files[f"{version.folder}/model.onnx"] = version.model.SerializeToString(deterministic=True)
        files[f"{version.folder}/expected.json"] = expected_json(version)
    if labels:
        files |= {f"{name}/labels.txt": "\n".join(labels) + "\n", f"{name}/model.toml": 'labels = "labels.txt"\n'}
    if name == "digits":
        files["digits/sample.json"] = request(versions[0], row) + "\n"
    return files


def write(files) -> None:
    contents = {path: content.encode() if isinstance(content, str) else content for path, content in files.items()}
    for path, content in contents.items():
        if len(content) > MAX_BYTES:
            raise SystemExit(f"{path}: {len(content)} bytes, expected at most {MAX_BYTES}")
    for path, content in contents.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(content)
