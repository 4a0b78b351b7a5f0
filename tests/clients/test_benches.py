"""The benchmarks' models and arithmetic: same bytes, batched as they come, ratios that are right. Nothing is timed."""

import hashlib
import sys

import numpy as np
import pytest
from support import REPOSITORY, Server, json_outputs

sys.path.insert(0, str(REPOSITORY / "benches"))

import models  # noqa: E402
import peers  # noqa: E402
import performance  # noqa: E402
import ratios  # noqa: E402

# By the versions of numpy, onnx and protobuf that requirements.txt pins.
DIGESTS = {
    "mlp": "c91ff9ba30602ec29c7a6cfa5b4b7269d89e536c657f70fbc43a1dabfc993c5a",
    "digits_cnn": "da9aa2d5b8e86cf52ae548f2e65a04d68cff1091eefdad607a1366a8ab5f080b",
    "encoder": "8076e92d4d3d7173b213026a69707542ede7b2f39600b872f254b795e7772966",
    "mobilenet": "26b2664e436b5103b0504e6d3cb949d307c3c7e431f3cb2ea64e78779ec7ce98",
    "identity_1mib": "ab541dccd73cb7bc46d1e47c0fe571458d3a022a8ef9a6f23c74bc89ea0b0281",
}

ROUNDS = [float(n) for n in range(1, 12)]


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_has_the_same_bytes_everywhere(name):
    assert digest(models.MODELS[name]()) == DIGESTS[name]


def test_a_request_is_the_same_every_time_and_others_differ():
    one, again, other = (models.request("mlp", seed=seed)["features"] for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(models.write(tmp_path_factory.mktemp("benches")))
    yield server
    server.stop()


@pytest.mark.parametrize("name, rows", [("mlp", 2), ("digits_cnn", 10), ("encoder", 384), ("mobilenet", 1000)])
def test_models_answer_and_batch_by_their_own_proof(server, name, rows):
    answer = server.post(f"/v2/models/{name}/infer", models.as_json(models.request(name, 16)))
    [(datatype, shape, data)] = json_outputs(answer).values()
    assert (datatype, shape) == ("FP32", [1, rows])
    assert np.isfinite(data).all() and np.std(data) > 0
    assert server.scrape().total("tidegate_model_info", model=name, batching="true") == 1


def test_the_identity_hands_back_every_bit(server):
    sent = models.request("identity_1mib")["input"]
    answer = server.post("/v2/models/identity_1mib/infer", models.as_json({"input": sent}))
    [(_, _, data)] = json_outputs(answer).values()
    assert np.array(data, np.float32).tobytes() == sent.tobytes()


# --- arithmetic ------------------------------------------------------------------------------------


def test_the_interval_is_of_order_statistics():
    # Of 11 fair coins at most one shows heads in 12 of 2048 cases, at most two in 67: one may be left out on each side.
    assert ratios.interval(ROUNDS) == (2, 10)
    assert ratios.interval(ROUNDS[::-1]) == (2, 10)
    assert ratios.interval(ROUNDS[:6]) == (1, 6)
    # Too few to say anything: all there is.
    assert ratios.interval(ROUNDS[:3]) == (1, 3)
    assert ratios.interval([5.0]) == (5, 5)
    assert ratios.summary(ROUNDS) == (6, 2, 10)


def test_intervals_hold_the_median_as_often_as_they_say():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        low, high = ratios.interval(random.lognormal(size=11))
        held += low <= 1 <= high
    assert held / 2000 >= 0.95


def test_ratios_are_of_rounds_and_not_of_medians():
    # A neighbour took half the machine in every other round, from both alike.
    ours, theirs = [10.0, 5.0, 10.0, 5.0], [20.0, 10.0, 20.0, 10.0]
    assert ratios.paired(ours, theirs) == [0.5] * 4
    assert ratios.paired([1.0, 0.0, 3.0], [2.0, 2.0, 0.0]) == [0.5, 0.0]
    with pytest.raises(ValueError):
        ratios.paired([1.0], [1.0, 2.0])


def test_the_ceiling_is_composed_of_the_times_of_both():
    assert ratios.composed(100, 100) == 50
    assert ratios.composed(285, 1e12) == pytest.approx(285)
    assert ratios.of_ceiling([50.0, 45.0, 60.0], [100.0, 100.0, 300.0], [100.0, 0.0, 75.0]) == [1.0, 1.0]


def test_a_verdict_doubts_where_the_interval_holds_the_bound():
    assert ratios.verdict([0.96] * 11, 0.95) == "met"
    assert ratios.verdict([0.90] * 11, 0.95) == "missed"
    assert ratios.verdict([0.94 + n / 100 for n in range(11)], 0.98) == "met?"
    assert ratios.verdict([0.94 + n / 100 for n in range(11)], 1.0) == "missed?"
    assert ratios.verdict([0.07] * 11, 0.08, at_least=False) == "met"
    assert ratios.verdict([0.09] * 11, 0.08, at_least=False) == "missed"


def cell(rows, instances, threads, rate, p50):
    return {"rows": rows, "instances": instances, "threads": threads, "rows_per_second": rate, "p50": p50}


CELLS = [cell(1, 1, 1, 120, 8.3), cell(1, 1, 2, 170, 5.9), cell(1, 2, 1, 240, 8.3), cell(8, 2, 1, 285, 56.0)]


def test_the_best_settings_are_found_for_many_and_for_one():
    assert ratios.best_cell(CELLS)["rows"] == 8
    assert ratios.best_single(CELLS)["threads"] == 2


def measured():
    """Every kind of measurement that the page tells of, as matrix.py keeps it."""
    side = lambda rate, cpu: {  # noqa: E731
        "per_second": [rate] * 11, "p50": [6.0] * 11, "p99": [9.0] * 11, "server_us": [cpu] * 11
    }
    pair = {"ours": side(270.0, 7000.0), "theirs": side(50_000.0, 20.0)}
    many = {"engine": {"rows_per_second": [285.0] * 11, "p50": [56.0] * 11}}
    one = {"engine": {"rows_per_second": [170.0] * 11, "p50": [5.9] * 11}}
    start = {"first": [0.5], "second": [0.2], "memory": [{"rss": 64 << 20, "pss": 32 << 20}]}
    cells = {f"{kind}/encoder_32/binary/8": pair | many for kind in ("echo", "unbatched", "fixed", "unmonitored")}
    fair = {"fair/quiet beside two greedy": {"alone": [2.0] * 11, "beside": [4.0] * 11}}
    starts = fair | {"start/empty": start, "start/examples": start}
    return {"engine/encoder_32": CELLS, "echo/encoder_32/binary/1": pair | one} | cells | starts


def test_the_page_tells_every_measurement_and_its_target():
    about = performance.surroundings() | {"rounds": 11}
    page = performance.matrix(about, measured())
    of_ceiling = 270 / ratios.composed(285, 50_000)
    assert f"| encoder_32, REST, binary, 8 clients: of the ceiling | {of_ceiling:.2f} (" in page
    assert f"latency over the best layout's | {6.0 / 5.9:.2f} (1.02–1.02) | ≤ 1.1 | met |" in page
    assert "p99 over alone | 2.00 (2.00–2.00) | ≤ 1.5 | missed |" in page
    assert "| 285/s | 2 × 1, 8 rows | 5.9 ms | 1: 8.3 ms, 2: 5.9 ms |" in page
    assert "| quiet beside two greedy | 2 ms | 4 ms | 2.00 (2.00–2.00) |" in page
    assert "| examples | 500 ms | 200 ms | 64 MiB | 32 MiB | +0 MiB |" in page
    for title in ("Targets", "Batching, over none", "Monitoring, over none", "Chosen by itself"):
        assert f"### {title}" in page


def test_cpu_time_decides_where_rounds_cannot():
    rounds = [0.9 + n / 50 for n in range(11)]
    assert performance.judged([0.99] * 11, 0.98, True, [0.5] * 11) == "met"
    assert performance.judged(rounds, 0.98, True) == "met?"
    told = performance.judged(rounds, 0.98, True, [0.97] * 11)
    assert told == "met? By CPU time 0.97 (0.97–0.97): missed"


def test_only_what_stands_between_the_marks_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("by hand\n<!-- a: written by make -->\nold\n<!-- end of a -->\nmore\n<!-- end of b -->\n")
    performance.put("a", "new", page)
    performance.put("a", "newer", page)
    assert page.read_text() == (
        "by hand\n<!-- a: written by make -->\n\nnewer\n<!-- end of a -->\nmore\n<!-- end of b -->\n"
    )


def test_the_page_has_a_place_for_every_part():
    page = (REPOSITORY / "docs/performance.md").read_text()
    for part in ("matrix", "peers"):
        assert page.count(f"<!-- {part}: written by make -->\n") == page.count(f"<!-- end of {part} -->") == 1


def test_a_peer_that_failed_is_told_by_its_last_words():
    assert peers.last_line("Traceback\n  ValueError: no port\n  }\n;\n\n") == "ValueError: no port"
    assert peers.last_line("\n") == "it says nothing"
