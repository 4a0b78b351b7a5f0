"""Statistics and configurations by tritonclient's four clients, in its own messages."""

import numpy as np
import pytest
from google.protobuf import json_format
from support import Client, eventually
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

PHASES = ["success", "queue", "compute_input", "compute_infer", "compute_output"]


def message(of, answer):
    """An answer in the client's own message: a field it does not know is an error."""
    return json_format.ParseDict(answer, of())


def statistics(client, *arguments):
    return message(service_pb2.ModelStatisticsResponse, client.call("get_inference_statistics", *arguments)).model_stats


def config(client, *arguments):
    answer = client.call("get_model_config", *arguments)
    return message(model_config_pb2.ModelConfig, answer if client.is_http else answer["config"])


def test_what_runs_is_counted(client):
    [before] = statistics(client, "sum_rows", "1")
    rows = {name: np.ones((3, 16), np.float32) for name in ("INPUT0", "INPUT1")}
    client.infer("sum_rows", rows)
    with pytest.raises(InferenceServerException):
        client.infer("sum_rows", {"INPUT0": rows["INPUT0"]})

    def counted():
        [after] = statistics(client, "sum_rows", "1")
        assert after.inference_count - before.inference_count == 3
        assert after.execution_count - before.execution_count == 1
        then, now = before.inference_stats, after.inference_stats
        assert now.fail.count - then.fail.count == 1
        for phase in PHASES:
            assert getattr(now, phase).count - getattr(then, phase).count == 1, phase
            assert getattr(now, phase).ns >= getattr(then, phase).ns, phase
        by_size = [{b.batch_size: b.compute_infer.count for b in of.batch_stats} for of in (before, after)]
        assert by_size[1][3] - by_size[0].get(3, 0) == 1
        assert after.last_inference >= before.last_inference > -1
        assert not after.memory_usage and not after.response_stats

    eventually(counted)


def test_both_protocols_tell_the_same(models):
    """By version, by model, and all; nothing runs meanwhile."""
    clients = [Client(kind, models) for kind in ("http", "grpc")]
    for arguments in (["digits", "1"], ["digits"], []):

        def same():
            # The last request of an earlier test may be counted in between.
            over_http, over_grpc = (list(statistics(client, *arguments)) for client in clients)
            assert over_http == over_grpc

        eventually(same)
    names = [(model.name, model.version) for model in statistics(clients[0])]
    assert names == sorted(names) and ("digits", "1") in names and ("digits", "2") in names
    assert [model.version for model in statistics(clients[1], "digits")] == ["1", "2"]
    for arguments in (["digits"], ["wine", "1"], ["tumor"], ["diabetes"]):
        over_http, over_grpc = (config(client, *arguments) for client in clients)
        assert over_http == over_grpc and over_http.name == arguments[0]
    for client in clients:
        client.close()


def test_numbers_and_defaults_are_written_over_http(models):
    """As perf_analyzer's JSON reader needs them: no 64-bit number as text, no default left out."""
    written = models.get("/v2/models/digits/config").json()
    assert written["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert written["model_transaction_policy"] == {"decoupled": False}
    assert written["response_cache"] == {"enable": False}
    assert written["max_batch_size"] > 1000
    [tensor] = written["input"]
    wanted = {"name": "image", "data_type": "TYPE_FP32", "dims": [64]}
    wanted |= {"optional": False, "is_shape_tensor": False, "allow_ragged_batch": False}
    assert wanted.items() <= tensor.items()
    counts = models.get("/v2/models/stats").json()["model_stats"][0]
    assert type(counts["last_inference"]) is int and type(counts["inference_stats"]["fail"]["ns"]) is int
    assert set(counts["inference_stats"]) == {*PHASES, "fail", "cache_hit", "cache_miss"}
    assert {"batch_stats", "memory_usage", "response_stats"} <= set(counts)


def test_configurations_fit_what_may_be_sent(client):
    """A client that builds its request from the configuration is answered."""
    for model, dtype in (("sum_rows", np.float32), ("fixed_batch", np.float32), ("gather", np.int64)):
        told = config(client, model)
        assert told.platform.endswith("_onnx") and told.backend == told.platform.removesuffix("_onnx")
        batch = [5] if told.max_batch_size else []
        assert told.max_batch_size == 0 or told.max_batch_size >= 5
        shapes = {tensor.name: batch + list(tensor.dims) for tensor in told.input}
        assert all(extent > 0 for shape in shapes.values() for extent in shape), shapes
        answer = client.infer(model, {name: np.ones(shape, dtype) for name, shape in shapes.items()})
        for tensor in told.output:
            assert list(answer[tensor.name].shape) == batch + list(tensor.dims)
        assert told.HasField("dynamic_batching") == bool(batch)
        assert not told.model_transaction_policy.decoupled and told.instance_group[0].count >= 1


@pytest.mark.parametrize("method", ["get_model_config", "get_inference_statistics"])
def test_an_unknown_model_has_neither(client, method):
    for arguments in (["nothing"], ["nothing", "1"], ["sentinel", "9"]):
        with pytest.raises(InferenceServerException) as caught:
            client.call(method, *arguments)
        assert caught.value.status() == ("404" if client.is_http else "StatusCode.NOT_FOUND")


def test_both_are_listed(client):
    assert {"statistics", "model_configuration"} <= set(client.call("get_server_metadata")["extensions"])
