"""Health, readiness, metadata and the repository index, as clients and probes ask for them."""

import pathlib

import grpc
import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import CALL_SECONDS, ENGINE, TRACT_LACKS, TRAPS, golden_files, log_fields
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

DIGITS = {"inputs": [("image", "FP32", [-1, 64])], "outputs": [("probabilities", "FP32", [-1, 10])]}


def test_the_example_registry_is_complete():
    served = {(model, version) for model, version, _ in golden_files()}
    assert {("digits", "1"), ("digits", "2"), ("tumor", "1"), ("diabetes", "1"), ("wine", "1")} <= served


def test_live_and_ready(client):
    assert client.call("is_server_live") is True
    assert client.call("is_server_ready") is True


def test_model_ready(client):
    assert client.call("is_model_ready", "sentinel") is True
    assert client.call("is_model_ready", "sentinel", "1") is True


@pytest.mark.parametrize("name, version", [("nothing", ""), ("nothing", "1"), ("sentinel", "9")])
def test_an_unknown_model_is_not_ready(client, name, version):
    try:
        ready = client.call("is_model_ready", name, version)
    except InferenceServerException as error:
        assert not client.is_http and error.status() == "StatusCode.NOT_FOUND"
    else:
        assert ready is False


def test_server_metadata(client):
    metadata = client.call("get_server_metadata")
    assert metadata["name"] == "tidegate"
    assert metadata["version"]
    assert "binary_tensor_data" in metadata["extensions"]
    refused = {"system_shared_memory", "cuda_shared_memory"}
    assert not refused & set(metadata["extensions"]), "an extension is listed that the server does not offer"


def signature(tensors):
    """[(name, datatype, shape)]; protobuf's JSON writes int64 as text and leaves an empty shape out."""
    return [(t["name"], t["datatype"], [int(d) for d in t.get("shape", [])]) for t in tensors]


@pytest.mark.parametrize("version", ["", "1", "2"])
def test_model_metadata(model_client, version):
    metadata = model_client.call("get_model_metadata", "digits", version)
    assert metadata["name"] == "digits"
    assert metadata["versions"] == ["1", "2"]
    assert "onnxruntime" in metadata["platform"] or "tract" in metadata["platform"]
    for side, tensors in DIGITS.items():
        assert signature(metadata[side]) == tensors


def test_metadata_of_a_scalar_and_of_two_free_axes(client):
    metadata = client.call("get_model_metadata", "scalar")
    assert signature(metadata["inputs"]) == [("x", "FP32", [-1, 4]), ("scale", "FP32", [])]
    metadata = client.call("get_model_metadata", "encoder")
    assert signature(metadata["outputs"]) == [("last_hidden_state", "FP32", [-1, -1, 32])]


def test_metadata_of_an_unknown_model(client):
    with pytest.raises(InferenceServerException) as caught:
        client.call("get_model_metadata", "nothing")
    assert caught.value.status() == ("404" if client.is_http else "StatusCode.NOT_FOUND")
    assert caught.value.message() == "Request for unknown model: 'nothing' is not found"


# --- HTTP bodies, which tritonclient does not look at but KServe's client and people do -------------


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/sentinel/ready", {"name": "sentinel", "ready": True}),
        ("/v2/models/sentinel/versions/1/ready", {"name": "sentinel", "ready": True}),
    ],
)
def test_health_bodies(traps, path, body):
    response = traps.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/json")
    assert response.json() == body


@pytest.mark.parametrize("path", ["/v2/models/nothing/ready", "/v2/models/sentinel/versions/9/ready"])
def test_the_readiness_of_an_unknown_model_is_a_404(traps, path):
    response = traps.get(path)
    assert response.status_code == 404
    assert set(response.json()) >= {"error"}


PATHS = ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/sentinel"]
PATHS += ["/v2/models/sentinel/ready", "/v2/models/sentinel/versions/1", "/v2/models/sentinel/versions/1/ready"]
PATHS += ["/v2/models/sentinel/config"]


@pytest.mark.parametrize("path", PATHS)
def test_a_trailing_slash_and_head_change_nothing(traps, path):
    plain, slash = traps.get(path), traps.get(path + "/")
    assert (plain.status_code, slash.status_code) == (200, 200)
    assert slash.json() == plain.json()
    for asked in (path, path + "/"):
        head = requests.head(traps.url + asked, timeout=CALL_SECONDS)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == plain.headers["content-type"]
        assert head.headers["content-length"] == str(len(plain.content))


def test_a_percent_encoded_name(traps):
    assert traps.get("/v2/models/%73entinel").json()["name"] == "sentinel"
    for path, name in (("no%20such", "no such"), ("no%2Fsuch", "no/such"), ("n%C3%A9", "n\u00e9")):
        response = traps.get(f"/v2/models/{path}")
        message = f"Request for unknown model: '{name}' is not found"
        assert (response.status_code, response.json()["error"]) == (404, message)


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v2/nothing", "/v2/models/sentinel/nothing", "/v2/models//ready"])
def test_unknown_paths(traps, path):
    response = traps.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"error": "Not Found"}


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", "/v2/models/sentinel/infer", {"POST"}),
        ("PUT", "/v2/models/sentinel/infer", {"POST"}),
        ("GET", "/v2/repository/index", {"POST"}),
        ("POST", "/v2/health/live", {"GET", "HEAD"}),
        ("DELETE", "/v2/models/sentinel", {"GET", "HEAD"}),
    ],
)
def test_unknown_methods(traps, method, path, allowed):
    response = requests.request(method, traps.url + path, timeout=CALL_SECONDS)
    assert response.status_code == 405
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]
    assert {name.strip() for name in response.headers["allow"].split(",")} == allowed


def test_what_is_not_offered_is_refused_and_changes_nothing(client):
    with pytest.raises(InferenceServerException) as caught:
        client.call("get_system_shared_memory_status")
    assert caught.value.status() == ("404" if client.is_http else "StatusCode.UNIMPLEMENTED")
    assert client.call("is_model_ready", "sentinel") is True


# --- engines --------------------------------------------------------------------------------------


def test_metadata_metrics_log_and_process_name_the_same_engine(models):
    engine = models.engine("digits")
    assert engine == (ENGINE or engine)
    properties = models.get("/v2/models/digits").json()["properties"]
    assert properties["backend"] == engine and properties["backend_reason"]
    info = models.scrape().select("tidegate_model_info", model="digits")
    assert [dict(pairs)["backend"] for pairs in info] == [engine, engine]
    [chosen] = [f for f in map(log_fields, models.lines) if f.get("message") == "engine chosen"]
    assert chosen["backend"] == engine and chosen["reason"]
    maps = pathlib.Path(f"/proc/{models.process.pid}/maps")
    if maps.exists():
        assert ("libonnxruntime" in maps.read_text()) == (engine == "onnxruntime")


def test_the_engine_serves_what_it_can_and_says_why_it_cannot(traps):
    refused = TRACT_LACKS if traps.engine("sentinel") == "tract" else set()
    rows = {row["name"]: row for row in traps.post("/v2/repository/index").json()}
    assert set(rows) == {path.parent.parent.name for path in TRAPS.glob("*/1/model.onnx")}
    for name, row in rows.items():
        assert row["state"] == ("UNAVAILABLE" if name in refused else "READY"), row
        assert ("tract" in row["reason"]) == (name in refused), row


# --- index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["", "{}", '{"ready":true}'])
def test_repository_index(models, body):
    response = models.post("/v2/repository/index", body)
    assert response.status_code == 200, response.text
    rows = {(row["name"], row["version"]): row["state"] for row in response.json()}
    assert rows == {(model, version): "READY" for model, version, _ in golden_files()}


def test_repository_index_by_tritonclient(model_client):
    index = model_client.call("get_model_repository_index")
    rows = index if model_client.is_http else index["models"]
    assert {(row["name"], row["version"], row["state"]) for row in rows} == {
        (model, version, "READY") for model, version, _ in golden_files()
    }


def test_bad_models_fail_alone_with_a_reason(traps_bad):
    rows = {row["name"]: row for row in traps_bad.post("/v2/repository/index").json()}
    assert set(rows) == {"corrupt", "empty", "escaping_external"}
    for row in rows.values():
        assert row["state"] == "UNAVAILABLE" and row["reason"], row
        assert str(traps_bad.http) not in row["reason"] and "/tests/" not in row["reason"], row
    assert traps_bad.post("/v2/repository/index", {"ready": True}).json() == []
    with grpc.insecure_channel(traps_bad.grpc) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryIndex
        over_grpc = ask(service_pb2.RepositoryIndexRequest(), timeout=CALL_SECONDS).models
        assert {row.name: (row.version, row.state, row.reason) for row in over_grpc} == {
            name: (row["version"], row["state"], row["reason"]) for name, row in rows.items()
        }
        assert not ask(service_pb2.RepositoryIndexRequest(ready=True), timeout=CALL_SECONDS).models
    assert traps_bad.get("/v2/models/escaping_external/ready").status_code != 200


# --- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
def test_grpc_health(traps, service):
    with grpc.insecure_channel(traps.grpc) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = check(health_pb2.HealthCheckRequest(service=service), timeout=CALL_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_grpc_health_watch_begins_with_the_state(traps):
    with grpc.insecure_channel(traps.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_grpc_health_of_an_unknown_service(traps):
    with grpc.insecure_channel(traps.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="nothing"), timeout=CALL_SECONDS
            )
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_on_the_observation_port(traps, path):
    for method in ("GET", "HEAD"):
        assert requests.request(method, f"http://{traps.metrics}{path}", timeout=CALL_SECONDS).status_code == 200


def test_the_data_port_serves_no_metrics(traps):
    assert traps.get("/metrics").status_code == 404
