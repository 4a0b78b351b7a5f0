"""The `/metrics` page itself: it parses, its labels are bounded, and it counts requests."""

import numpy as np
import requests
from support import CALL_SECONDS, REPOSITORY, eventually

X = np.zeros((1, 4), np.float32)
PREFIX = "tidegate_"


def test_the_page_parses(traps):
    traps.infer("logits", {"x": X})
    samples = traps.scrape()
    ours = [f for f in samples.families if f.name.startswith(PREFIX)]
    assert len(ours) >= 10
    for family in ours:
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation, f"{family.name} has no HELP"


def test_the_content_type_is_prometheus_text(traps):
    response = requests.get(f"http://{traps.metrics}/metrics", timeout=CALL_SECONDS)
    assert response.headers["content-type"].startswith("text/plain")


def test_histograms_are_well_formed(traps):
    traps.infer("logits", {"x": X})
    samples = traps.scrape()
    series = {}
    for (name, pairs), value in samples.items():
        if name.startswith(PREFIX) and name.endswith("_bucket"):
            labels = dict(pairs)
            series.setdefault((name, tuple(p for p in pairs if p[0] != "le")), []).append((float(labels["le"]), value))
    assert series
    for (name, rest), buckets in series.items():
        buckets.sort()
        counts = [count for _, count in buckets]
        assert buckets[-1][0] == np.inf and counts == sorted(counts), (name, rest)
        assert samples[name.replace("_bucket", "_count"), rest] == counts[-1], (name, rest)


def test_requests_are_counted(traps, client):
    protocol = "http" if client.is_http else "grpc"

    def count():
        return traps.scrape().total("tidegate_requests_total", model="logits", protocol=protocol)

    before = count()
    for _ in range(5):
        client.infer("logits", {"x": X})
    client.refused(400, "INVALID_ARGUMENT", "logits", {"x": X, "extra": X})
    eventually(lambda: equal(count() - before, 6))


def equal(got, want):
    assert got == want


def test_unknown_models_never_become_a_label(traps):
    for i in range(20):
        traps.infer(f"nothing_{i}", {"x": X})
    text = requests.get(f"http://{traps.metrics}/metrics", timeout=CALL_SECONDS).text
    assert "nothing_" not in text


def test_model_info_names_digest_and_backend(models):
    info = models.scrape().select("tidegate_model_info", model="digits")
    assert len(info) == 2
    for pairs in info:
        labels = dict(pairs)
        assert labels["digest"] and labels["backend"] in ("onnxruntime", "tract") and labels["device"] == "cpu"


def test_every_metric_is_documented(models):
    documented = (REPOSITORY / "docs/metrics.md").read_text()
    for model in ("digits", "diabetes"):
        inputs = models.get(f"/v2/models/{model}").json()["inputs"][0]
        models.infer(model, {inputs["name"]: np.zeros((1, inputs["shape"][1]), np.float32)})
    for family in models.scrape().families:
        if family.name.startswith(PREFIX):
            assert f"`{family.name}`" in documented or f"`{family.name}_total`" in documented, family.name
