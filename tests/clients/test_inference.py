"""Inference by real clients: goldens, every datatype, both representations, compression, ids, deadlines, many at once."""

import gzip
import http.client
import json
import re
import socket
import zlib

import grpc
import numpy as np
import pytest
import requests
from support import (
    CALL_SECONDS,
    EXAMPLES,
    FIELDS,
    Samples,
    assert_close,
    datatype,
    golden_cases,
    golden_files,
    json_input,
    json_outputs,
    require,
    same_bits,
    trap_cases,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

X = np.arange(24, dtype=np.float32).reshape(3, 8)
A, B = X[:2].repeat(2, axis=1), np.full((2, 16), 3, np.float32)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def strict_json(text):
    """Python's parser takes bare NaN and Infinity, which are not JSON."""

    def refuse(constant):
        raise AssertionError(f"bare {constant} in a JSON body")

    return json.loads(text, parse_constant=refuse)


# --- goldens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
@pytest.mark.parametrize("model, version, path", golden_files(), ids=lambda v: v if isinstance(v, str) else "")
def test_goldens(model_client, model, version, path, as_json):
    if as_json and not model_client.is_http:
        pytest.skip("gRPC has no JSON")
    for name, inputs, outputs, tolerance in golden_cases(path):
        asked = [model_client.output(o, as_json) for o in outputs]
        answer = model_client.infer(model, inputs, version=version, outputs=asked, as_json=as_json)
        assert (answer.field("model_name"), answer.field("model_version")) == (model, version)
        for output, want in outputs.items():
            assert_close(answer[output], want, tolerance)


@pytest.mark.parametrize("name", trap_cases())
def test_traps_are_answered_right(client, traps, name):
    require(traps, name)
    inputs, outputs = trap_cases()[name]
    answer = client.infer(name, inputs)
    assert answer.names() == list(outputs)
    for output, want in outputs.items():
        assert_close(answer[output], want, {"relative": 1e-4, "absolute": 1e-5})


def test_the_highest_version_answers_by_default(model_client):
    digits = {"image": np.zeros((1, 64), np.float32)}
    assert model_client.infer("digits", digits).field("model_version") == "2"
    assert model_client.infer("digits", digits, version="1").field("model_version") == "1"


# --- representations -------------------------------------------------------------------------------


def test_inputs_and_outputs_go_by_name(client):
    answer = client.infer("sum_rows", {"INPUT1": B, "INPUT0": A})
    assert answer.names() == ["OUTPUT0", "OUTPUT1"]
    assert same_bits(answer["OUTPUT0"], A + B)
    assert same_bits(answer["OUTPUT1"], A - B)


def test_only_requested_outputs_return(client):
    answer = client.infer("sum_rows", {"INPUT0": A, "INPUT1": B}, outputs=["OUTPUT1"])
    assert answer.names() == ["OUTPUT1"]
    assert same_bits(answer["OUTPUT1"], A - B)


@pytest.mark.parametrize("as_json", [(), ("INPUT0",), ("INPUT1",), True])
def test_json_and_binary_inputs_mix(client, as_json):
    if not client.is_http:
        pytest.skip("gRPC has no JSON")
    outputs = [client.output("OUTPUT0", as_json=True), client.output("OUTPUT1", as_json=False)]
    answer = client.infer("sum_rows", {"INPUT0": A, "INPUT1": B}, as_json=as_json, outputs=outputs)
    assert same_bits(answer["OUTPUT0"], A + B)
    assert same_bits(answer["OUTPUT1"], A - B)
    first, second = answer.message["outputs"]
    assert "data" in first and "binary_data_size" not in first.get("parameters", {})
    assert "data" not in second and second["parameters"]["binary_data_size"] == A.nbytes


def test_nested_data_equals_flat_data(traps):
    flat = traps.infer("sentinel", {"x": X})
    nested = {"name": "x", "shape": [3, 8], "datatype": "FP32", "data": X.tolist()}
    answer = traps.post("/v2/models/sentinel/infer", {"inputs": [nested]})
    assert json_outputs(answer) == json_outputs(flat) == {"y": ("FP32", [3, 8], (2 * X + 1).flatten().tolist())}


def test_json_answer(traps):
    response = traps.infer("sentinel", {"x": X}, id="abc")
    assert response.headers["content-type"].startswith("application/json")
    assert "inference-header-content-length" not in response.headers
    body = strict_json(response.text)
    assert (body["id"], body["model_name"], body["model_version"]) == ("abc", "sentinel", "1")


def binary_body(model_inputs, **more):
    """A body in the binary tensor extension, and its header's length."""
    inputs = [
        {
            "name": n,
            "shape": list(a.shape),
            "datatype": datatype(a),
            "parameters": {"binary_data_size": a.nbytes},
        }
        for n, a in model_inputs.items()
    ]
    header = json.dumps({"inputs": inputs, **more}).encode()
    return header + b"".join(a.tobytes() for a in model_inputs.values()), {
        "Inference-Header-Content-Length": str(len(header))
    }


def test_binary_answer_byte_for_byte(traps):
    body, headers = binary_body({"x": X}, parameters={"binary_data_output": True})
    response = traps.post("/v2/models/sentinel/infer", body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["inference-header-content-length"])
    header, tail = json.loads(response.content[:length]), response.content[length:]
    assert header["outputs"][0]["parameters"]["binary_data_size"] == len(tail) == X.nbytes
    assert tail == (2 * X + 1).tobytes()


@pytest.mark.parametrize("pad", range(4))
def test_binary_tensors_need_no_alignment(traps, pad):
    body, headers = binary_body({"x": X}, id="i" * (1 + pad), parameters={"binary_data_output": True})
    response = traps.post("/v2/models/sentinel/infer", body, headers=headers)
    assert response.content.endswith((2 * X + 1).tobytes())


def test_raw_mode(traps):
    headers = {"Inference-Header-Content-Length": "0"}
    response = traps.post("/v2/models/sentinel/infer", X[:1].tobytes(), headers=headers)
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:length])["outputs"][0]["shape"] == [1, 8]
    assert response.content[length:] == (2 * X[:1] + 1).tobytes()


def test_raw_mode_is_one_row_where_the_width_is_free(traps):
    headers = {"Inference-Header-Content-Length": "0"}
    response = traps.post("/v2/models/identity_fp32/infer", X.tobytes(), headers=headers)
    assert response.status_code == 200, response.text
    header = json.loads(response.content[: int(response.headers["inference-header-content-length"])])
    assert header["outputs"][0]["shape"] == [1, 24]
    assert response.content.endswith(X.tobytes())


@pytest.mark.parametrize("model", ["sum_rows", "encoder", "identity_bytes"])
def test_raw_mode_needs_one_input_whose_shape_follows(traps, model):
    headers = {"Inference-Header-Content-Length": "0"}
    response = traps.post(f"/v2/models/{model}/infer", bytes(64), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]


def test_a_scalar_is_sent_as_nothing_and_as_one(client):
    for scale in (np.array(2.5, np.float32), np.array([2.5], np.float32)):
        answer = client.infer("scalar", {"x": X[:, :4], "scale": scale})
        assert same_bits(answer["y"], X[:, :4] * np.float32(2.5))


def test_tensors_larger_than_tonics_default_limit(client):
    big = np.arange(2 << 20, dtype=np.float32).reshape(1, -1)
    assert same_bits(client.infer("identity_fp32", {"x": big})["y"], big)


# --- ids and provenance ----------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["", "abc", "\u00e9\u4e16 1/2"])
def test_the_request_id_is_echoed(client, sent):
    assert client.infer("sentinel", {"x": X}, request_id=sent).field("id") == sent


def test_every_answer_says_which_prediction_it_is(client):
    ids = {client.infer("sentinel", {"x": X}, request_id="same").parameter("prediction_id") for _ in range(3)}
    assert len(ids) == 3 and all(UUID.fullmatch(i) for i in ids)


def test_provenance_headers(models):
    for version in ("1", "2"):
        response = models.infer("digits", {"image": np.zeros((1, 64), np.float32)}, version=version)
        assert response.headers["x-prediction-id"] == response.json()["parameters"]["prediction_id"]
        assert response.headers["x-model-version"] == version
        assert DIGEST.fullmatch(response.headers["x-model-digest"])
    again = models.infer("digits", {"image": np.zeros((1, 64), np.float32)})
    assert again.headers["x-model-digest"] == response.headers["x-model-digest"]
    assert again.headers["x-prediction-id"] != response.headers["x-prediction-id"]


def test_refusals_say_which_prediction_they_were_and_who_answered(traps):
    wrong = {"inputs": [json_input("x", np.zeros((1, 3), np.float32))]}
    grpc_wrong = raw_request("sentinel", "x", "FP32", [1, 3], raw=bytes(12))
    grpc_unknown = raw_request("nothing", "x", "FP32", [1, 3], raw=bytes(12))
    refused = [traps.post(f"/v2/models/{name}/infer", wrong).headers for name in ("sentinel", "nothing")]
    with grpc.insecure_channel(traps.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for request in (grpc_wrong, grpc_unknown):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(request, timeout=CALL_SECONDS)
            refused.append(dict(caught.value.initial_metadata()) | dict(caught.value.trailing_metadata()))
    assert len({said["x-prediction-id"] for said in refused}) == len(refused)
    assert [said.get("x-model-version") for said in refused] == ["1", None, "1", None]
    assert DIGEST.fullmatch(refused[0]["x-model-digest"]) and refused[0]["x-model-digest"] == refused[2]["x-model-digest"]


def test_server_timing(traps):
    """Durations in milliseconds, by phase (W3C Server-Timing)."""
    timing = traps.infer("sentinel", {"x": X}).headers["server-timing"]
    phases = {}
    for entry in timing.split(","):
        name, *parameters = [part.strip() for part in entry.split(";")]
        phases[name] = float(dict(p.split("=") for p in parameters)["dur"])
    assert {"queue", "compute"} <= set(phases)
    assert all(duration >= 0 for duration in phases.values())


def test_provenance_over_grpc(traps):
    request = raw_request("sentinel", "x", "FP32", [1, 8], raw=X[:1].tobytes())
    with grpc.insecure_channel(traps.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer, call = stub.ModelInfer.with_call(request, timeout=CALL_SECONDS)
        metadata = dict(call.initial_metadata()) | dict(call.trailing_metadata())
    assert answer.model_version == "1"
    assert UUID.fullmatch(answer.parameters["prediction_id"].string_param)
    said = [p.string_param for p in answer.parameters.values()] + list(metadata.values())
    assert any(DIGEST.fullmatch(str(value)) for value in said), said


# --- compression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
def test_compression(client, algorithm, as_json):
    rows = np.arange(8000, dtype=np.float32).reshape(1000, 8)
    if client.is_http:
        outputs = [client.output("y", as_json)]
        for request, response in ((algorithm, None), (None, algorithm), (algorithm, algorithm)):
            answer = client.infer(
                "sentinel",
                {"x": rows},
                as_json=as_json,
                outputs=outputs,
                request_compression_algorithm=request,
                response_compression_algorithm=response,
            )
            assert same_bits(answer["y"], 2 * rows + 1)
    elif not as_json:
        answer = client.infer("sentinel", {"x": rows}, compression_algorithm=algorithm)
        assert same_bits(answer["y"], 2 * rows + 1)


@pytest.mark.parametrize("algorithm, inflate", [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_responses_really_are_compressed(traps, algorithm, inflate):
    rows = np.zeros((1000, 8), np.float32)
    body = {"inputs": [json_input("x", rows)]}
    url, headers = f"{traps.url}/v2/models/sentinel/infer", {"Accept-Encoding": algorithm}
    with requests.post(url, json=body, headers=headers, stream=True, timeout=CALL_SECONDS) as response:
        assert response.headers["content-encoding"] == algorithm
        small = response.raw.read(decode_content=False)
    whole = inflate(small)
    assert len(small) < len(whole) / 10
    assert json.loads(whole)["outputs"][0]["data"] == [1.0] * 8000


def test_no_compression_where_none_is_asked_for(traps):
    rows = np.zeros((1000, 8), np.float32)
    response = traps.infer("sentinel", {"x": rows}, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("encoding", ["br", "zstd", "nonsense"])
def test_an_unknown_encoding_is_refused_with_what_is_known(traps, encoding):
    response = traps.post("/v2/models/sentinel/infer", b"?", headers={"Content-Encoding": encoding})
    assert response.status_code == 415
    assert response.json()["error"]
    assert {e.strip() for e in response.headers["accept-encoding"].split(",")} == {"gzip", "deflate"}


def test_a_long_body_may_wait_for_the_server(traps):
    """`Expect: 100-continue`, as curl sends it with more than 1 MiB."""
    big = np.arange(1 << 19, dtype=np.float32).reshape(1, -1)
    body, headers = binary_body({"x": big}, parameters={"binary_data_output": True})
    with announced(traps, "identity_fp32", headers, len(body)) as connection:
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        assert response.read().endswith(big.tobytes())


def test_a_body_over_the_limit_is_refused_unsent(traps):
    with announced(traps, "identity_fp32", {}, 1 << 40) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
        assert json.loads(response.read())["error"]


def announced(traps, model, headers, length):
    """A connection on which a request's head was sent, and its body was not."""
    host, port = traps.http.split(":")
    connection = socket.create_connection((host, int(port)), CALL_SECONDS)
    head = [f"POST /v2/models/{model}/infer HTTP/1.1", f"Host: {traps.http}", "Expect: 100-continue"]
    head += [f"{name}: {value}" for name, value in {**headers, "Content-Length": length}.items()]
    connection.sendall("\r\n".join([*head, "", ""]).encode())
    return connection


# --- datatypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_datatype_returns_bit_for_bit(client, traps, name):
    require(traps, f"identity_{name}")
    x = EXAMPLES[name]
    y = client.infer(f"identity_{name}", {"x": x})["y"]
    assert same_bits(y, x)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_datatype_returns_as_json(traps, name):
    require(traps, f"identity_{name}")
    x = EXAMPLES[name]
    response = traps.infer(f"identity_{name}", {"x": x})
    assert response.status_code == 200, response.text
    [output] = strict_json(response.text)["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype(x), [2, 3])
    assert same_bits(np.array(output["data"], x.dtype).reshape(x.shape), x)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp64"])
def test_every_bit_pattern_of_a_float_passes_in_binary(client, traps, name):
    """Signalling NaN and denormals among them: all 65 536 upper halves, for the wide types."""
    require(traps, f"identity_{name}")
    kind = EXAMPLES[name].dtype
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bits if kind.itemsize == 2 else bits.astype(f"u{kind.itemsize}") << (8 * kind.itemsize - 16)
    x = (wide | (0 if kind.itemsize == 2 else 1)).view(kind).reshape(256, 256)
    assert same_bits(client.infer(f"identity_{name}", {"x": x})["y"], x)


@pytest.mark.parametrize("value", [b"\x00", b"a\x00b", bytes(range(256)), b"\xff\xfe"])
def test_strings_return_exactly_or_are_refused(client, value):
    """An engine may have no place for a NUL or for bytes that are no UTF-8; it must not change them."""
    x = np.array([[value, b"neighbour"]], np.object_)
    try:
        y = client.infer("identity_bytes", {"x": x})["y"]
    except InferenceServerException as error:
        assert error.status() in ("400", "StatusCode.INVALID_ARGUMENT"), str(error)
    else:
        assert same_bits(y, x)


def raw_request(model, name, dtype, shape, raw=None, **contents):
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name=name, datatype=dtype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


TYPED = {
    "bool": [True, False],
    "int8": [-128, 127],
    "int16": [-(1 << 15), (1 << 15) - 1],
    "int32": [-(1 << 31), (1 << 31) - 1],
    "int64": [-(1 << 63), (1 << 63) - 1],
    "uint8": [0, 255],
    "uint16": [0, 65535],
    "uint32": [0, (1 << 32) - 1],
    "uint64": [0, (1 << 64) - 1],
    "fp32": [0.5, -2.25],
    "fp64": [0.1, -2.25],
    "bytes": [b"a", b""],
}


@pytest.fixture(scope="module")
def stub(traps):
    with grpc.insecure_channel(traps.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("name", TYPED)
def test_typed_grpc_contents(stub, traps, name):
    require(traps, f"identity_{name}")
    values, dtype = TYPED[name], name.upper()
    request = raw_request(f"identity_{name}", "x", dtype, [1, 2], **{FIELDS[dtype]: values})
    answer = stub.ModelInfer(request, timeout=CALL_SECONDS)
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == (dtype, [1, 2])
    [raw] = answer.raw_output_contents
    if name == "bytes":
        assert raw == b"\x01\x00\x00\x00a\x00\x00\x00\x00"
    else:
        assert raw == np.array(values, EXAMPLES[name].dtype).tobytes()


@pytest.mark.parametrize(
    "request_",
    [
        raw_request("identity_int8", "x", "INT8", [1, 1], int_contents=[300]),
        raw_request("identity_uint8", "x", "UINT8", [1, 1], uint_contents=[256]),
        raw_request("identity_fp32", "x", "FP32", [1, 2], fp32_contents=[1]),
        raw_request("identity_fp32", "x", "FP32", [1, 2], int64_contents=[1, 2]),
        raw_request("identity_fp32", "x", "FP32", [1, 2]),
        raw_request("identity_fp32", "x", "FP32", [1, 2], raw=bytes(7)),
        raw_request("identity_fp32", "x", "FP32", [1, 2], raw=bytes(8), fp32_contents=[1, 2]),
        raw_request("identity_fp32", "x", "FP32", [-1, 2], raw=bytes(8)),
        raw_request("identity_fp32", "x", "FP33", [1, 2], raw=bytes(8)),
    ],
    ids=["overflow", "overflow_unsigned", "too_few", "wrong_field", "nothing", "short", "both", "negative", "unknown"],
)
def test_bad_grpc_contents(stub, request_):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_, timeout=CALL_SECONDS)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details()


@pytest.mark.parametrize("version", ["", "-1"])
def test_grpc_without_a_version(stub, version):
    request = raw_request("sentinel", "x", "FP32", [1, 8], raw=X[:1].tobytes())
    request.model_version = version
    assert stub.ModelInfer(request, timeout=CALL_SECONDS).model_version == "1"


def test_an_output_that_is_no_tensor_is_left_out(client, traps):
    require(traps, "zipmap")
    assert [o["name"] for o in client.call("get_model_metadata", "zipmap")["outputs"]] == ["output_label"]
    answer = client.infer("zipmap", {"features": np.eye(4, dtype=np.float32)})
    assert answer.names() == ["output_label"]
    assert answer["output_label"].shape == (4,)


def test_non_finite_answers(client, traps):
    """Binary carries the bits; JSON has no NaN, and never a bare one."""
    x = np.array([[1, 0, -1, 2]], np.float32)
    y = client.infer("nan_maker", {"x": x})["y"]
    assert np.isneginf(y[0, 1]) and np.isnan(y[0, 2]) and np.isfinite(y[0, [0, 3]]).all()
    body = strict_json(traps.infer("nan_maker", {"x": x}).text)
    if "outputs" in body:
        data = body["outputs"][0]["data"]
        assert data[0] == 0.0 and not isinstance(data[1], (int, float)) and not isinstance(data[2], (int, float))
    else:
        assert body["error"]


# --- deadlines -------------------------------------------------------------------------------------


def test_a_generous_timeout_changes_nothing(client):
    assert same_bits(client.infer("sentinel", {"x": X}, timeout=60_000_000)["y"], 2 * X + 1)


def test_an_expired_timeout(client):
    """One microsecond is over before any queue can be looked at."""
    ids = np.ones((4, 64), np.int64)
    client.refused(504, "DEADLINE_EXCEEDED", "encoder", {"input_ids": ids, "attention_mask": ids}, timeout=1)
    assert client.call("is_server_ready")


def test_a_timeout_header_in_milliseconds(traps):
    require(traps, "slow")
    steps = np.array(1_000_000, np.int64)
    response = traps.infer("slow", {"steps": steps}, headers={"X-Request-Timeout": "50"})
    assert response.status_code == 504
    assert response.elapsed.total_seconds() < 2, "the deadline must not wait for the run"
    assert traps.infer("slow", {"steps": np.array(1, np.int64)}).status_code == 200


def test_a_grpc_deadline(stub, traps):
    require(traps, "slow")
    request = raw_request("slow", "steps", "INT64", [], raw=np.int64(1_000_000).tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


# --- many at once ----------------------------------------------------------------------------------


def test_64_callers_each_get_their_own_answer(aio):
    """10^5 rows, no two alike, 64 requests in flight: y = 2x + 1 is exact, so a swapped row shows."""
    rows, count = 64, 1600
    sent = [np.arange(8 * rows, dtype=np.float32).reshape(rows, 8) + 8 * rows * i for i in range(count)]
    for x, answer in zip(sent, aio.infer_all("sentinel", [{"x": x} for x in sent])):
        assert not isinstance(answer, Exception), answer
        assert same_bits(answer["y"], 2 * x + 1)


def test_waiting_requests_share_executions(aio, traps):
    rng = np.random.default_rng(7)
    sent = [{"input_ids": rng.integers(0, 100, (1, 48)), "attention_mask": np.ones((1, 48), np.int64)} for _ in range(256)]
    alone = [aio.infer("encoder", one)["last_hidden_state"] for one in sent[:32]]
    before = executions(traps.scrape(), "encoder")
    answers = aio.infer_all("encoder", sent)
    for answer, want in zip(answers, alone):
        np.testing.assert_allclose(answer["last_hidden_state"], want, rtol=1e-4, atol=1e-5)
    if traps.engine("encoder") == "onnxruntime":
        runs = executions(traps.scrape(), "encoder") - before
        assert 0 < runs < len(sent)


def executions(samples: Samples, model):
    return samples.total("tidegate_batch_size_count", model=model)


@pytest.mark.parametrize("model", ["mean_centred", "row_coupled", "time_major", "int8_dynamic", "batch_norm_training"])
def test_rows_that_couple_are_never_batched(aio, traps, model):
    """Each caller gets the very answer that a lone caller gets."""
    require(traps, model)
    [spec] = aio.call("get_model_metadata", model)["inputs"]
    rng = np.random.default_rng(11)
    sent = [{spec["name"]: rng.normal(0, 10, (1 + i % 3, int(spec["shape"][1]))).astype(np.float32)} for i in range(192)]
    [output] = aio.infer(model, sent[0]).names()
    alone = [aio.infer(model, one)[output] for one in sent]
    for answer, want in zip(aio.infer_all(model, sent), alone):
        assert not isinstance(answer, Exception), answer
        np.testing.assert_allclose(answer[output], want, rtol=1e-5, atol=1e-6)


def test_one_bad_request_among_many_fails_alone(aio):
    ids = np.arange(256, dtype=np.int64) % 10
    ids[100] = 10
    want = [aio.infer("gather", {"ids": np.array([[i]], np.int64)})["embedding"] for i in range(10)]
    answers = aio.infer_all("gather", [{"ids": i.reshape(1, 1)} for i in ids])
    for i, answer in zip(ids, answers):
        if i == 10:
            assert answer.status() == ("400" if aio.is_http else "StatusCode.INVALID_ARGUMENT"), str(answer)
        else:
            assert not isinstance(answer, Exception), answer
            assert same_bits(answer["embedding"], want[i])


def test_models_that_refuse_invented_inputs_are_served(client):
    assert client.infer("refuses_zeros", {"ids": np.array([[1000], [1009]], np.int64)})["y"].shape == (2, 1, 2)
    assert client.infer("only_seven", {"x": np.ones((2, 7), np.float32)})["y"].shape == (2, 2)
    ids = np.array([[990, 0], [0, 0]], np.int64)
    pooled = client.infer("inconclusive", {"ids": ids})["pooled"]
    assert pooled[0].any() and not pooled[1].any()


def test_recurrent_state_goes_round(client):
    state = np.zeros((2, 3, 128), np.float32)
    x = np.ones((3, 16), np.float32)
    seen = []
    for _ in range(3):
        answer = client.infer("recurrent", {"input": x, "state": state})
        assert answer["output"].shape == (3, 1) and answer["state_out"].shape == state.shape
        seen.append(float(answer["output"][0, 0]))
        state = answer["state_out"].copy()
    assert len(set(seen)) == 3


def test_a_reverse_lstm_runs_backwards(client, traps):
    require(traps, "reverse_lstm")
    x = np.zeros((5, 1, 4), np.float32)
    x[4] = 1
    y = client.infer("reverse_lstm", {"sequence": x})["y"]
    other = client.infer("reverse_lstm", {"sequence": x[4:]})["y"]
    np.testing.assert_allclose(y[4], other[0], rtol=1e-5, err_msg="the last step is the first one run")
    assert not np.allclose(y[0], y[4])
