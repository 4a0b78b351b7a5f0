"""Errors: statuses and the texts that tests in the wild match on, by every client."""

import json

import numpy as np
import pytest
from support import Client

X = np.zeros((1, 4), np.float32)
INVALID = (400, "INVALID_ARGUMENT")
MISSING = (404, "NOT_FOUND")


def test_unknown_model(client):
    message = client.refused(*MISSING, "nothing", {"x": X})
    assert message == "Request for unknown model: 'nothing' is not found"


def test_unknown_version(client):
    message = client.refused(*MISSING, "logits", {"x": X}, version="9")
    assert message.startswith("Request for unknown model: 'logits'") and "9" in message


def test_no_request_id_before_the_text(client):
    message = client.refused(*MISSING, "nothing", {"x": X}, request_id="abc")
    assert message == "Request for unknown model: 'nothing' is not found"


@pytest.mark.parametrize(
    "shape, got", [((1, 5), "[1,5]"), ((4,), "[4]"), ((1, 1, 4), "[1,1,4]"), ((0, 5), "[0,5]"), ((), "[]")]
)
def test_wrong_shape(client, shape, got):
    message = client.refused(*INVALID, "logits", {"x": np.zeros(shape, np.float32)})
    assert message == f"unexpected shape for input 'x' for model 'logits'. Expected [-1,4], got {got}"


def test_two_rows_for_a_fixed_batch(client):
    message = client.refused(*INVALID, "fixed_batch", {"image": np.zeros((2, 3, 4, 4), np.float32)})
    assert message == "unexpected shape for input 'image' for model 'fixed_batch'. Expected [1,3,4,4], got [2,3,4,4]"


@pytest.mark.parametrize("kind, name", [(np.int64, "INT64"), (np.float64, "FP64"), (np.float16, "FP16"), (bool, "BOOL")])
def test_wrong_datatype(client, kind, name):
    message = client.refused(*INVALID, "logits", {"x": X.astype(kind)})
    assert message == f"inference input 'x' data-type is '{name}', but model 'logits' expects 'FP32'"


def test_strings_for_numbers(client):
    message = client.refused(*INVALID, "logits", {"x": np.full((1, 4), "1", np.object_)})
    assert message == "inference input 'x' data-type is 'BYTES', but model 'logits' expects 'FP32'"


def test_missing_input(client):
    message = client.refused(*INVALID, "sum_rows", {"INPUT0": np.zeros((1, 16), np.float32)})
    assert message == (
        "expected 2 inputs but got 1 inputs for model 'sum_rows'. Got input(s) ['INPUT0'], "
        "but missing required input(s) ['INPUT1']. Please provide all required input(s)."
    )


def test_unexpected_input(client):
    message = client.refused(*INVALID, "logits", {"x": X, "extra": X})
    assert "'extra'" in message and "'logits'" in message


def test_input_named_in_another_case(client):
    message = client.refused(*INVALID, "logits", {"X": X})
    assert "'X'" in message and "'x'" in message


def test_unexpected_output(client):
    message = client.refused(*INVALID, "logits", {"x": X}, outputs=["z"])
    assert message == "unexpected inference output 'z' for model 'logits'"


def test_duplicate_names(client: Client):
    client.refused(*INVALID, "logits", {"x": X}, outputs=["logits", "logits"])
    twice = client.inputs({"x": X}) + client.inputs({"x": X})
    with pytest.raises(Exception) as caught:
        client.wait(client.raw.infer("logits", twice))
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_the_engines_own_refusal_is_the_clients_fault(client):
    client.refused(*INVALID, "gather", {"ids": np.array([[10]], np.int64)})
    client.refused(*INVALID, "refuses_zeros", {"ids": np.array([[0]], np.int64)})


def test_a_body_over_the_limit(client):
    big = np.zeros((1, (64 << 20) // 4), np.float32)
    client.refused(413, "RESOURCE_EXHAUSTED", "identity_fp32", {"x": big})
    assert client.call("is_server_ready")


def test_an_error_leaves_the_connection_usable(client):
    client.refused(*INVALID, "logits", {"x": X, "extra": X})
    assert client.infer("logits", {"x": X})["logits"].shape == (1, 3)


# --- JSON that no client library would send --------------------------------------------------------


def post(traps, data, shape=(1, 1), dtype="INT32", model="identity_int32", **more):
    tensor = {"name": "x", "shape": list(shape), "datatype": dtype, "data": data, **more}
    return traps.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})


@pytest.mark.parametrize(
    "model, dtype, data",
    [
        ("identity_int32", "INT32", [1.5]),
        ("identity_int32", "INT32", [1 << 31]),
        ("identity_int8", "INT8", [128]),
        ("identity_uint8", "UINT8", [300]),
        ("identity_uint32", "UINT32", [-1]),
        ("identity_int64", "INT64", [1 << 63]),
        ("identity_uint64", "UINT64", [1 << 64]),
        ("identity_int32", "INT32", ["1"]),
        ("identity_int32", "INT32", [True]),
        ("identity_int32", "INT32", [None]),
        ("identity_fp32", "FP32", ["1"]),
        ("identity_fp32", "FP32", [1e39]),
        ("identity_bool", "BOOL", [2]),
        ("identity_bytes", "BYTES", [1]),
    ],
)
def test_json_numbers_are_exact_or_refused(traps, model, dtype, data):
    response = post(traps, data, dtype=dtype, model=model)
    assert response.status_code == 400, response.text
    assert response.json()["error"]


@pytest.mark.parametrize("data", ["[NaN]", "[Infinity]", "[-Infinity]", "[1e999]", "[01]", "[.5]", "[0x1]", "[1,]"])
def test_literals_that_are_not_json(traps, data):
    body = '{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":%s}]}' % data
    response = traps.post("/v2/models/identity_fp32/infer", body)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("exact", [(1 << 53) + 1, (1 << 63) - 1, -(1 << 63)])
def test_large_integers_stay_exact(traps, exact):
    response = post(traps, [exact], dtype="INT64", model="identity_int64")
    assert response.json()["outputs"][0]["data"] == [exact]


@pytest.mark.parametrize(
    "data, shape",
    [
        ([1, 2, 3], (2, 2)),
        ([[1, 2], [3]], (2, 2)),
        ([[1, 2, 3, 4]], (2, 2)),
        ([[1], [2]], (1, 2)),
        ([[[1, 2]], [[3, 4]]], (2, 2)),
        ([[1, 2], 3], (2, 2)),
        (5, (1, 1)),
        ({}, (1, 1)),
    ],
)
def test_data_that_does_not_fit_its_shape(traps, data, shape):
    response = post(traps, data, shape)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("shape", ["[1,1]", [1.5, 1], [-1, 1], None, [1 << 62, 1 << 62], [1 << 64, 1], [[1], [1]]])
def test_shapes_that_are_none(traps, shape):
    tensor = {"name": "x", "shape": shape, "datatype": "INT32", "data": [1]}
    response = traps.post("/v2/models/identity_int32/infer", {"inputs": [tensor]})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("body", ["", "{}", "[]", "null", '""', "{", '{"inputs":[]}', '{"inputs":[]} x', b"\xff\xfe"])
def test_bodies_that_are_no_request(traps, body):
    response = traps.post("/v2/models/sentinel/infer", body)
    assert response.status_code == 400, response.text
    assert set(response.json()) >= {"error"}
    assert response.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("length", ["-1", "+5", "0x10", "1e3", "99999999999", "99999999999999999999999", "x"])
def test_header_lengths_that_are_none(traps, length):
    headers = {"Inference-Header-Content-Length": length}
    response = traps.post("/v2/models/sentinel/infer", b"{}", headers=headers)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("declared, tail", [(31, 32), (33, 32), (32, 31), (32, 33), (-1, 32), (1 << 64, 32), ("32", 32)])
def test_binary_sizes_must_add_up(traps, declared, tail):
    parameters = {"binary_data_size": declared}
    tensor = {"name": "x", "shape": [1, 8], "datatype": "FP32", "parameters": parameters}
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    response = traps.post("/v2/models/sentinel/infer", header + bytes(tail), headers=headers)
    assert response.status_code == 400, response.text


def test_shared_memory_is_not_offered(traps):
    tensor = {
        "name": "x",
        "shape": [1, 8],
        "datatype": "FP32",
        "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 32},
    }
    response = traps.post("/v2/models/sentinel/infer", {"inputs": [tensor]})
    assert response.status_code in (400, 501), response.text
