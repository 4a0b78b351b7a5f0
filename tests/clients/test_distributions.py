"""Prediction distributions: known rows go in, and `/metrics` moves by what numpy computes from the answers.

Counts must agree exactly, moments to 1e-6 relative. Confidence is the largest probability, entropy is a
share of its maximum ln(classes), over the last axis; a logit output counts as its softmax; one sigmoid probability counts as two classes.
"""

from collections import Counter

import numpy as np
import pytest
from support import MODELS, eventually, golden_cases

CLASS = "tidegate_prediction_class_total"
CONFIDENCE = "tidegate_prediction_confidence"
ENTROPY = "tidegate_prediction_entropy"
VALUE = "tidegate_prediction_value"
SQUARES = "tidegate_prediction_value_squares_total"
NAN = "tidegate_prediction_nan_total"
INF = "tidegate_prediction_inf_total"

MOMENT = {"rel": 1e-6, "abs": 1e-9}
ROWS = 200


class Deltas:
    """What one version's series of one output gained since it was made."""

    def __init__(self, server, model, version, output):
        self.server, self.labels = server, {"model": model, "version": version, "output": output}
        self.before = server.scrape()

    def gained(self, name):
        """{the labels that are left: gain} of every series of `name` that moved."""
        now = self.server.scrape().select(name, **self.labels)
        was = self.before.select(name, **self.labels)
        return {pairs: value - was.get(pairs, 0) for pairs, value in now.items() if value != was.get(pairs, 0)}

    def total(self, name):
        return sum(self.gained(name).values())

    def classes(self):
        return {dict(pairs)["class"]: gain for pairs, gain in self.gained(CLASS).items()}

    def check_histogram(self, name, values):
        """Count, every bucket and the sum of a histogram against the values it must have been given."""

        def check():
            assert self.total(f"{name}_count") == len(values)

        eventually(check)
        assert self.total(f"{name}_sum") == pytest.approx(float(np.sum(values)), **MOMENT)
        gains = {float(dict(pairs)["le"]): gain for pairs, gain in self.gained(f"{name}_bucket").items()}
        edges = [float(dict(p)["le"]) for p in self.server.scrape().select(f"{name}_bucket", **self.labels)]
        assert np.inf in edges and len(edges) >= 5
        for edge in edges:
            # A value within rounding of an edge may fall on either side.
            near = edge * np.array([1 - 1e-6, 1 + 1e-6]) if np.isfinite(edge) else [edge, edge]
            low, high = (int(np.sum(values <= e)) for e in sorted(near))
            assert low <= gains.get(edge, 0) <= high, f"{name} le={edge}"


def named(counts, model):
    """Class counts by label, where `labels.txt` names the classes; else by index."""
    path = MODELS / model / "labels.txt"
    labels = path.read_text().splitlines() if path.exists() else None
    return {labels[i] if labels else str(i): n for i, n in counts.items()}


def rows(width, seed, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, (ROWS, width)).astype(np.float32)


def answers(client, model, arrays, output, version=""):
    """The output of all rows, sent in requests of 1 to 7 rows."""
    parts, start, size = [], 0, 1
    [(name, x)] = arrays.items()
    while start < len(x):
        parts.append(client.infer(model, {name: x[start : start + size]}, version=version)[output])
        start, size = start + size, size % 7 + 1
    return np.concatenate(parts).astype(np.float64)


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def entropy(p):
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=-1) / np.log(p.shape[-1])


def check_classes(deltas, model, p):
    counts = Counter(p.argmax(axis=-1).tolist())

    def check():
        assert deltas.classes() == named(counts, model)

    eventually(check)
    deltas.check_histogram(CONFIDENCE, p.max(axis=-1))
    deltas.check_histogram(ENTROPY, entropy(p))
    assert deltas.total(NAN) == deltas.total(INF) == 0
    assert deltas.total(f"{VALUE}_count") == 0, "probabilities are no values"


def inputs_of(server, model):
    [spec] = server.get(f"/v2/models/{model}").json()["inputs"]
    return spec["name"], spec["shape"][1]


# Inputs near the data the models were trained on, so that more than one class is answered.
SPREAD = {
    "digits": lambda seed: np.random.default_rng(seed).uniform(0, 16, (ROWS, 64)).astype(np.float32),
    "tumor": lambda seed: near_goldens("tumor", seed),
    "wine": lambda seed: near_goldens("wine", seed),
    "diabetes": lambda seed: near_goldens("diabetes", seed),
}


def near_goldens(model, seed):
    cases = list(golden_cases(MODELS / model / "1" / "expected.json"))
    pool = np.concatenate([next(iter(inputs.values())) for _, inputs, _, _ in cases])
    rng = np.random.default_rng(seed)
    return (pool[rng.integers(0, len(pool), ROWS)] * rng.uniform(0.7, 1.3, (ROWS, 1))).astype(np.float32)


@pytest.mark.parametrize("model, version", [("digits", "1"), ("digits", "2"), ("tumor", "1"), ("wine", "1")])
def test_probabilities(models, model_client, model, version):
    name, _ = inputs_of(models, model)
    deltas = Deltas(models, model, version, "probabilities")
    p = answers(model_client, model, {name: SPREAD[model](1)}, "probabilities", version)
    assert len(set(p.argmax(axis=-1))) > 1, "the rows are too alike to show anything"
    check_classes(deltas, model, p)


def test_labels(models, model_client):
    name, _ = inputs_of(models, "wine")
    deltas = Deltas(models, "wine", "1", "label")
    labels = answers(model_client, "wine", {name: SPREAD["wine"](2)}, "label").astype(int)

    def check():
        assert deltas.classes() == named(Counter(labels.tolist()), "wine")

    eventually(check)


def test_versions_are_counted_apart(models, model_client):
    other = Deltas(models, "digits", "1", "probabilities")
    mine = Deltas(models, "digits", "2", "probabilities")
    answers(model_client, "digits", {"image": SPREAD["digits"](3)}, "probabilities")
    eventually(lambda: equal(mine.total(f"{CONFIDENCE}_count"), ROWS))
    assert other.total(f"{CONFIDENCE}_count") == 0


def equal(got, want):
    assert got == want


def test_softmax_under_another_name(traps, client):
    deltas = Deltas(traps, "softmaxed", "1", "y")
    check_classes(deltas, "softmaxed", answers(client, "softmaxed", {"x": rows(4, 4, 3)}, "y"))


def test_logits(traps, client):
    deltas = Deltas(traps, "logits", "1", "logits")
    check_classes(deltas, "logits", softmax(answers(client, "logits", {"x": rows(4, 5, 3)}, "logits")))


def test_one_sigmoid_probability_is_two_classes(traps, client):
    deltas = Deltas(traps, "sigmoid", "1", "y")
    y = answers(client, "sigmoid", {"x": rows(4, 6, 3)}, "y")
    check_classes(deltas, "sigmoid", np.concatenate([1 - y, y], axis=-1))


def check_values(deltas, y):
    """Non-finite numbers are counted, and kept out of the moments."""
    finite = y[np.isfinite(y)]
    deltas.check_histogram(VALUE, finite)
    assert deltas.total(SQUARES) == pytest.approx(float(np.sum(finite**2)), **MOMENT)
    assert deltas.total(NAN) == np.isnan(y).sum()
    assert deltas.total(INF) == np.isinf(y).sum()
    assert deltas.classes() == {}, "values are no classes"


def test_regression_values(models, model_client):
    name, _ = inputs_of(models, "diabetes")
    deltas = Deltas(models, "diabetes", "1", "progression")
    check_values(deltas, answers(model_client, "diabetes", {name: SPREAD["diabetes"](7)}, "progression"))


def test_values_of_both_signs(traps, client):
    deltas = Deltas(traps, "sentinel", "1", "y")
    check_values(deltas, answers(client, "sentinel", {"x": rows(8, 8, 100)}, "y"))


def test_nan_and_infinity(traps, client):
    deltas = Deltas(traps, "nan_maker", "1", "y")
    x = rows(4, 9, 2)
    x[::5, 0] = 0
    y = answers(client, "nan_maker", {"x": x}, "y")
    assert np.isnan(y).any() and np.isinf(y).any()
    check_values(deltas, y)


def test_refused_requests_predict_nothing(traps, client):
    deltas = Deltas(traps, "logits", "1", "logits")
    client.refused(400, "INVALID_ARGUMENT", "logits", {"x": np.zeros((1, 5), np.float32)})
    client.infer("logits", {"x": np.zeros((1, 4), np.float32)})
    eventually(lambda: equal(deltas.total(f"{CONFIDENCE}_count"), 1))


def test_an_output_nobody_asked_for_is_counted_too(traps, client):
    """The model predicted it; which outputs a caller wants back changes nothing."""
    deltas = Deltas(traps, "sum_rows", "1", "OUTPUT1")
    ones = np.ones((1, 16), np.float32)
    client.infer("sum_rows", {"INPUT0": ones, "INPUT1": ones}, outputs=["OUTPUT0"])
    eventually(lambda: equal(deltas.total(f"{VALUE}_count"), 16))
