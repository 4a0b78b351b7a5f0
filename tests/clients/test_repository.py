"""Models loaded and unloaded on request by tritonclient's four clients; the index and the refusals in every mode."""

import json
import shutil
import threading

import grpc
import numpy as np
import pytest
import tritonclient.http
from support import CALL_SECONDS, CLIENTS, MODELS, TRAPS, TRAPS_BAD, Client, Server, eventually
from tritonclient.utils import InferenceServerException

IMAGE = {"image": np.ones((1, 64), np.float32)}
ROW = {"x": np.ones((1, 4), np.float32)}
POLLING = "explicit model load / unload is not allowed if polling is enabled"


def add_version(registry, model, version, content=None):
    """A version of `digits`, or other content, whole once it is named."""
    folder = registry / model / version
    folder.mkdir(parents=True, exist_ok=True)
    content = (MODELS / "digits" / version / "model.onnx").read_bytes() if content is None else content
    (folder / "model.onnx.new").write_bytes(content)
    (folder / "model.onnx.new").rename(folder / "model.onnx")


@pytest.fixture
def registry(tmp_path):
    add_version(tmp_path, "digits", "1")
    shutil.copytree(TRAPS / "identity_fp32", tmp_path / "identity_fp32")
    shutil.copytree(TRAPS_BAD / "corrupt", tmp_path / "corrupt")
    return tmp_path


def serving(registry, *flags):
    """A server and a function that makes its clients, all gone with the test."""
    server, clients = Server(registry, *flags), []

    def connect(kind):
        clients.append(Client(kind, server))
        return clients[-1]

    yield server, connect
    for client in clients:
        client.close()
    server.stop()


@pytest.fixture
def explicit(binary, registry):
    yield from serving(registry, "--model-control", "explicit", "--repository-api")


def index(client):
    """Rows by name: (version, state, reason) each, all empty for a model that nobody asked for."""
    rows = client.call("get_model_repository_index")
    rows = rows if client.is_http else rows.get("models", [])
    found = {}
    for row in rows:
        found.setdefault(row["name"], []).append(tuple(row.get(key, "") for key in ("version", "state", "reason")))
    return found


def refused(http, code, call, *args, **more):
    client = call.__self__
    with pytest.raises(InferenceServerException) as caught:
        call(*args, **more)
    assert caught.value.status() == (str(http) if client.is_http else f"StatusCode.{code}"), str(caught.value)
    return caught.value.message()


@pytest.mark.parametrize("kind", CLIENTS)
def test_the_life_of_a_model(explicit, registry, kind):
    server, connect = explicit
    client = connect(kind)
    nobody = [("", "", "")]
    assert index(client) == {"corrupt": nobody, "digits": nobody, "identity_fp32": nobody}
    assert client.call("is_server_ready") is True
    assert "model_repository" in client.call("get_server_metadata")["extensions"]
    client.refused(404, "NOT_FOUND", "digits", IMAGE)

    client.call("load_model", "digits")
    assert client.infer("digits", IMAGE).field("model_version") == "1"
    assert index(client) == {"corrupt": nobody, "digits": [("1", "READY", "")], "identity_fp32": nobody}

    # A new version is served once it is asked for, beside the other one, which is not loaded again.
    before = server.scrape().total("tidegate_model_loads_total", outcome="ok")
    add_version(registry, "digits", "2")
    client.call("load_model", "digits")
    assert client.infer("digits", IMAGE).field("model_version") == "2"
    assert client.infer("digits", IMAGE, version="1").field("model_version") == "1"
    client.call("load_model", "digits")
    assert server.scrape().total("tidegate_model_loads_total", outcome="ok") == before + 1

    # One that fails leaves what serves; asked for again it is tried again.
    add_version(registry, "digits", "3", b"broken")
    for _ in range(2):
        message = refused(400, "INVALID_ARGUMENT", client.call, "load_model", "digits")
        assert message.startswith("load failed for model 'digits': version 3 is at UNAVAILABLE state: "), message
    assert client.infer("digits", IMAGE).field("model_version") == "2"
    assert [row[1] for row in index(client)["digits"]] == ["READY", "READY", "UNAVAILABLE"]
    shutil.rmtree(registry / "digits/3")
    client.call("load_model", "digits")

    client.call("unload_model", "digits", unload_dependents=True)
    message = client.refused(404, "NOT_FOUND", "digits", IMAGE)
    assert message == "Request for unknown model: 'digits' has no available versions"
    gone = [("1", "UNAVAILABLE", "unloaded"), ("2", "UNAVAILABLE", "unloaded")]
    eventually(lambda: check(index(client)["digits"] == gone))
    client.call("unload_model", "digits")
    client.call("unload_model", "nothing")
    client.call("load_model", "digits")
    assert client.infer("digits", IMAGE).field("model_version") == "2"


def check(condition):
    assert condition


@pytest.mark.parametrize("kind", CLIENTS)
def test_what_cannot_be_loaded(explicit, kind):
    _, connect = explicit
    client = connect(kind)
    message = refused(400, "INVALID_ARGUMENT", client.call, "load_model", "corrupt")
    assert message.startswith("load failed for model 'corrupt': version 1 is at UNAVAILABLE state: "), message
    message = refused(404, "NOT_FOUND", client.call, "load_model", "nothing")
    assert message == "failed to load 'nothing', failed to poll from model repository"
    message = refused(400, "INVALID_ARGUMENT", client.call, "load_model", "digits", config="{")
    assert message.startswith("parameter `config`: "), message
    if not client.is_http:
        files = {"file:1/model.onnx": b"model"}
        message = refused(400, "INVALID_ARGUMENT", client.call, "load_model", "digits", config="{}", files=files)
        assert "`file:1/model.onnx` is not supported" in message
    [(version, state, reason)] = index(client)["corrupt"]
    assert (version, state) == ("1", "UNAVAILABLE") and reason
    assert index(client)["digits"] == [("", "", "")]


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_configuration_given_with_the_load(explicit, kind):
    server, connect = explicit
    client = connect(kind)

    def told():
        return server.get("/v2/models/digits/config").json()

    batching = {"preferred_batch_size": [4], "max_queue_delay_microseconds": 50}
    config = {"name": "digits", "max_batch_size": 8, "dynamic_batching": batching, "instance_group": [{"count": 1}]}
    client.call("load_model", "digits", config=json.dumps(config))
    assert (told()["max_batch_size"], told()["instance_group"][0]["count"]) == (8, 1)
    assert told()["dynamic_batching"]["max_queue_delay_microseconds"] == 50
    # What a client is told it can send back, as model_analyzer does.
    before = told()
    client.call("load_model", "digits", config=json.dumps(before))
    assert told() == before
    client.call("load_model", "digits")
    assert told()["max_batch_size"] == 2**31 - 1


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_where_the_folder_decides(binary, registry, mode):
    for server, connect in serving(registry, "--model-control", mode, "--repository-api"):
        for client in map(connect, CLIENTS):
            for method in ("load_model", "unload_model"):
                assert refused(503, "UNAVAILABLE", client.call, method, "digits") == POLLING
            assert "model_repository" not in client.call("get_server_metadata")["extensions"]
            rows = index(client)
            assert (rows["digits"], rows["identity_fp32"]) == ([("1", "READY", "")], [("1", "READY", "")])
            assert rows["corrupt"][0][1] == "UNAVAILABLE"


def test_the_admin_port_loads_where_the_data_ports_do_not(binary, registry):
    flags = ["--model-control", "explicit", "--load-model", "digits", "--load-model", "identity_fp32"]
    for server, connect in serving(registry, *flags):
        for client in map(connect, CLIENTS):
            for method in ("load_model", "unload_model"):
                message = refused(403, "PERMISSION_DENIED", client.call, method, "digits")
                assert "`repository_api`" in message
            assert "model_repository" not in client.call("get_server_metadata")["extensions"]
            assert index(client)["digits"] == [("1", "READY", "")]
        with tritonclient.http.InferenceServerClient(server.admin) as admin:
            admin.unload_model("digits")
            assert client.call("is_model_ready", "identity_fp32") is True
            client.refused(404, "NOT_FOUND", "digits", IMAGE)
            admin.load_model("digits")
            assert {row["name"] for row in admin.get_model_repository_index()} == {"corrupt", "digits", "identity_fp32"}
        client.infer("digits", IMAGE)


def test_kserves_messages(explicit):
    """Its protobuf has the model's name in the first field, where Triton's has that of a repository."""
    server, _ = explicit
    name = b"identity_fp32"
    with grpc.insecure_channel(server.grpc) as channel:
        for method, serves in (("RepositoryModelLoad", 200), ("RepositoryModelUnload", 404)):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            message = b"\x0a" + bytes([len(name)]) + name
            assert call(message, timeout=CALL_SECONDS) == message + b"\x10\x01"
            assert server.infer("identity_fp32", ROW).status_code == serves


@pytest.mark.parametrize("kind", ["http_aio", "grpc_aio"])
def test_models_change_under_load(explicit, registry, kind):
    """Nothing fails but what comes once a model is being unloaded, and that is told that there is no such version."""
    server, connect = explicit
    control, client = connect("grpc"), connect(kind)
    control.call("load_model", "digits")
    unloading, done, answers = threading.Event(), threading.Event(), []

    def send():
        while not done.is_set():
            batch = client.infer_all("digits", [IMAGE] * 64)
            answers.append((unloading.is_set(), batch))

    def load_goes_on():
        begun = len(answers)
        eventually(lambda: check(len(answers) > begun), CALL_SECONDS)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(3):
            add_version(registry, "digits", "2")
            control.call("load_model", "digits")
            load_goes_on()
            shutil.rmtree(registry / "digits/2")
            control.call("load_model", "digits")
            load_goes_on()
        unloading.set()
        control.call("unload_model", "digits")
        control.refused(404, "NOT_FOUND", "digits", IMAGE)
        load_goes_on()
    finally:
        done.set()
        sender.join()
    failures = [a for _, batch in answers for a in batch if isinstance(a, Exception)]
    assert all("has no available versions" in str(failure) for failure in failures), failures[:3]
    assert failures, "what is unloaded is refused"
    before = [a for during, batch in answers if not during for a in batch]
    assert before and not [a for a in before if isinstance(a, Exception)]
