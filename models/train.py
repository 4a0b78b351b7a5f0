"""Trains the example registry beside this file: `make models`, or `python models/train.py` with requirements.txt installed.

Writes `model.onnx` and `expected.json` (answers of the framework that trained it) per model version, the twins of two of them as
`model.safetensors`, `labels.txt` and `model.toml` per classifier, `digits/sample.json`, and the marked parts of every README (measured quality, an example request).
Stops with an error, before writing anything, where ONNX Runtime disagrees with the framework on any held-out row, where digits 2
is not better than digits 1, or where a file would be larger than 1 MiB. Everything is seeded and runs on one thread, so two runs
on one machine write identical bytes; another kind of CPU may differ in the last bits.
"""

import os
import sys

# Before the imports that read them: the order of a sum must not depend on the number of cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "1"}
sys.dont_write_bytecode = True  # This folder is a registry that may be being served: a __pycache__ in it would look like a model.

import jax
import numpy as np
import sklearn
from sklearn import datasets
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cnn import cnn_logits, cnn_model, train_cnn
from graphs import dense_model, forest_model
from publish import Split, Version, folder_files, overview, write
from twins import Twin, digits_twin, tumor_twin, twin_files, twin_row

SEED = 0
SKLEARN = f"scikit-learn {sklearn.__version__}"


def split(bunch, labels=()) -> Split:
    rows, target = bunch.data.astype(np.float32), bunch.target
    parts = train_test_split(rows, target, test_size=0.25, random_state=SEED, stratify=target if len(labels) else None)
    return Split(*parts, [str(label) for label in labels])


def classifier(name, number, model, predict, source, recipe, data) -> Version:
    right = int((predict(data.test)["probabilities"].argmax(axis=1) == data.test_target).sum())
    score = right / len(data.test)
    return Version(name, number, model, predict, source, recipe, score, f"accuracy {score:.4f} ({right} of {len(data.test)})", data)


def digits_versions(data) -> tuple[list[Version], Twin]:
    mlp = MLPClassifier((32,), alpha=1e-3, max_iter=1000, random_state=SEED).fit(data.train / 16.0, data.train_target)
    dense = dense_model("digits", "image", "probabilities", 0, 16, list(zip(mlp.coefs_, mlp.intercepts_)))
    params = train_cnn(data.train, data.train_target, SEED)

    def ask_mlp(rows):
        return {"probabilities": mlp.predict_proba(rows.astype(np.float64) / 16)}

    def ask_cnn(rows):
        return {"probabilities": np.asarray(jax.nn.softmax(cnn_logits(params, rows)), np.float64)}

    versions = [
        classifier("digits", 1, dense, ask_mlp, f"{SKLEARN} MLPClassifier.predict_proba", "MLP, 64-32-10 (scikit-learn)", data),
        classifier("digits", 2, cnn_model(params), ask_cnn, f"JAX {jax.__version__}", "CNN, two convolutions and two dense layers (JAX)", data),
    ]
    return versions, digits_twin(versions[1], params)


def tumor_versions(data) -> tuple[list[Version], Twin]:
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(data.train.astype(np.float64), data.train_target)
    scaler, regression = pipeline[0], pipeline[1]
    # Two classes have one logit z: softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
    layer = [np.pad(array.T, [(0, 0)] * (array.ndim - 1) + [(1, 0)]) for array in (regression.coef_, regression.intercept_)]
    model = dense_model("tumor", "features", "probabilities", scaler.mean_, scaler.scale_, [layer])

    def ask(rows):
        return {"probabilities": pipeline.predict_proba(rows.astype(np.float64))}

    version = classifier("tumor", 1, model, ask, f"{SKLEARN} LogisticRegression.predict_proba", "standardised logistic regression (scikit-learn)", data)
    return [version], tumor_twin(version, scaler.mean_, scaler.scale_, layer)


def diabetes_versions(data) -> list[Version]:
    pipeline = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 20)))
    validated = cross_val_score(pipeline, data.train.astype(np.float64), data.train_target, cv=5).mean()
    scaler, ridge = pipeline.fit(data.train.astype(np.float64), data.train_target)
    layer = (ridge.coef_[:, None], np.array([ridge.intercept_]))
    model = dense_model("diabetes", "features", "progression", scaler.mean_, scaler.scale_, [layer])

    def ask(rows):
        return {"progression": pipeline.predict(rows.astype(np.float64))[:, None]}

    answers = ask(data.test)["progression"][:, 0]
    score, error = r2_score(data.test_target, answers), mean_absolute_error(data.test_target, answers)
    quality = f"R² {score:.3f}, mean absolute error {error:.1f} on {len(answers)} rows (R² in 5-fold cross-validation on the others {validated:.3f})"
    recipe = "standardised ridge regression (scikit-learn)"
    return [Version("diabetes", 1, model, ask, f"{SKLEARN} RidgeCV.predict", recipe, score, quality, data)]


def wine_versions(data) -> list[Version]:
    forest = RandomForestClassifier(100, random_state=SEED).fit(data.train, data.train_target)
    model = forest_model("wine", forest, data.train.shape[1], len(data.labels))

    def ask(rows):
        return {"label": forest.predict(rows), "probabilities": forest.predict_proba(rows)}

    return [classifier("wine", 1, model, ask, f"{SKLEARN} RandomForestClassifier", "random forest, 100 trees (scikit-learn)", data)]


def main() -> None:
    digits, tumor, wine = datasets.load_digits(), datasets.load_breast_cancer(), datasets.load_wine()
    digits_models, digits_st = digits_versions(split(digits, digits.target_names))
    tumor_models, tumor_st = tumor_versions(split(tumor, tumor.target_names))
    models, twins = [
        digits_models,
        tumor_models,
        diabetes_versions(split(datasets.load_diabetes(scaled=False))),
        wine_versions(split(wine, wine.target_names)),
    ], [digits_st, tumor_st]
    versions = [version for model in models for version in model]
    if versions[1].score <= versions[0].score:
        raise SystemExit(f"digits 2 is not better than digits 1: {versions[1].quality} against {versions[0].quality}")
    files = overview(versions, [twin_row(twin) for twin in twins])
    for model in models:
        files |= folder_files(model)
    for twin in twins:
        files |= twin_files(twin)
    write(files)
    for version in versions:
        print(f"{version.folder}: {version.recipe}: {version.quality}")


if __name__ == "__main__":
    main()
