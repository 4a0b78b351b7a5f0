"""The KServe SDK, unmodified, over REST (V2) and gRPC."""

import re

import numpy as np
import pytest
from kserve_sdk import Refused, Sdk
from support import EXAMPLES, assert_close, golden_cases, golden_files, same_bits

X = np.arange(24, dtype=np.float32).reshape(3, 8)
A, B = X[:2].repeat(2, axis=1), np.full((2, 16), 3, np.float32)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def connected(protocol, server):
    return Sdk(protocol, server.url if protocol == "rest" else server.grpc)


@pytest.fixture(scope="module", params=["rest", "grpc"])
def sdk(request, traps):
    return connected(request.param, traps)


@pytest.fixture(scope="module", params=["rest", "grpc"])
def model_sdk(request, models):
    return connected(request.param, models)


def refusal(sdk, rest, grpc, model, arrays, **more):
    """The text of an inference that must fail with this HTTP status, or this gRPC code."""
    with pytest.raises(Refused) as caught:
        sdk.infer(model, arrays, **more)
    expected = ("HTTPStatusError", rest) if sdk.protocol == "rest" else ("AioRpcError", grpc)
    assert (caught.value.kind, caught.value.status) == expected, caught.value.text
    return caught.value.text


# --- health ----------------------------------------------------------------------------------------


def test_the_server_is_live_and_ready(sdk):
    """Over REST the SDK reads `live` and `ready` out of JSON bodies, which Triton leaves empty."""
    assert sdk.ask("is_server_live") is True
    assert sdk.ask("is_server_ready") is True


def test_the_health_bodies_are_the_specifications(traps):
    assert traps.get("/v2/health/live").json() == {"live": True}
    assert traps.get("/v2/health/ready").json() == {"ready": True}
    assert traps.get("/v2/models/sentinel/ready").json() == {"name": "sentinel", "ready": True}


def test_a_model_is_ready_or_not(sdk):
    assert sdk.ask("is_model_ready", "sentinel") is True
    assert sdk.ask("is_model_ready", "nothing") is False


def test_a_base_url_may_end_with_a_slash(traps):
    sdk = Sdk("rest", traps.url + "/")
    assert sdk.ask("is_server_live") is True
    assert sdk.ask("is_model_ready", "sentinel") is True
    assert same_bits(sdk.infer("sentinel", {"x": X}).outputs["y"][2], 2 * X + 1)


# --- inference -------------------------------------------------------------------------------------


# Of the versions that answer by default, the highest: over REST the SDK names none.
GOLDENS = {model: path for model, _, path in sorted(golden_files(), key=lambda file: int(file[1]))}


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
@pytest.mark.parametrize("model", GOLDENS)
def test_goldens(model_sdk, model, as_json):
    for _, inputs, outputs, tolerance in golden_cases(GOLDENS[model]):
        answer = model_sdk.infer(model, inputs, as_json=as_json)
        assert answer.model_name == model
        assert set(outputs) <= set(answer.outputs)
        for output, want in outputs.items():
            assert_close(answer.outputs[output][2], want, tolerance)


def test_a_version_is_named_over_grpc(models):
    sdk = connected("grpc", models)
    for version in ("1", "2"):
        answer = sdk.infer("digits", {"image": np.zeros((1, 64), np.float32)}, version=version)
        assert answer.model_version == version


# It has no BF16, and sends FP16 as bytes only.
DATATYPES = [(name, as_json) for name in EXAMPLES if name != "bf16" for as_json in (False, True)]
DATATYPES.remove(("fp16", True))


@pytest.mark.parametrize("name, as_json", DATATYPES)
def test_every_datatype_that_the_sdk_has(sdk, name, as_json):
    x = EXAMPLES[name]
    answer = sdk.infer(f"identity_{name}", {"x": x}, as_json=as_json)
    kind, shape, y = answer.outputs["y"]
    assert (kind, shape) == (name.upper(), list(x.shape))
    assert same_bits(y, x)


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
def test_many_inputs_and_outputs(sdk, as_json):
    answer = sdk.infer("sum_rows", {"INPUT1": B, "INPUT0": A}, as_json=as_json)
    assert list(answer.outputs) == ["OUTPUT0", "OUTPUT1"]
    assert same_bits(answer.outputs["OUTPUT0"][2], A + B)
    assert same_bits(answer.outputs["OUTPUT1"][2], A - B)


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
def test_only_requested_outputs_return(sdk, as_json):
    answer = sdk.infer("sum_rows", {"INPUT0": A, "INPUT1": B}, as_json=as_json, outputs=["OUTPUT1"])
    assert list(answer.outputs) == ["OUTPUT1"]
    assert same_bits(answer.outputs["OUTPUT1"][2], A - B)


def test_binary_answers_are_octets_and_json_is_json(traps):
    sdk = connected("rest", traps)
    for as_json, kind in ((False, "application/octet-stream"), (True, "application/json")):
        answer = sdk.infer("sentinel", {"x": X}, as_json=as_json)
        assert answer.headers["content-type"] == kind
        assert ("inference-header-content-length" in answer.headers) is not as_json
        assert same_bits(answer.outputs["y"][2], 2 * X + 1)


def test_ids_and_parameters(sdk):
    parameters = {"custom": "any", "priority": 1, "timeout": 60_000_000, "flag": True}
    answer = sdk.infer("sentinel", {"x": X}, request_id="abc", parameters=parameters)
    assert answer.id == "abc"
    assert UUID.fullmatch(answer.parameters["prediction_id"])
    assert "custom" not in answer.parameters


def test_a_request_without_an_id(sdk):
    """Over REST the SDK makes one up."""
    answer = sdk.infer("sentinel", {"x": X})
    assert UUID.fullmatch(answer.id) if sdk.protocol == "rest" else answer.id == ""


def test_many_at_once_each_get_their_own_answer(sdk):
    requests = [("sentinel", {"x": np.full((1, 8), i, np.float32)}, {"request_id": str(i)}) for i in range(64)]
    answers = sdk.infer_all(requests)
    assert [answer.id for answer in answers] == [str(i) for i in range(64)]
    for i, answer in enumerate(answers):
        assert same_bits(answer.outputs["y"][2], np.full((1, 8), 2 * i + 1, np.float32))
    assert len({answer.parameters["prediction_id"] for answer in answers}) == 64


# --- errors ----------------------------------------------------------------------------------------


def test_an_unknown_model(sdk):
    text = refusal(sdk, 404, "NOT_FOUND", "nothing", {"x": X})
    assert "Request for unknown model: 'nothing' is not found" in text


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
def test_a_wrong_shape(sdk, as_json):
    text = refusal(sdk, 400, "INVALID_ARGUMENT", "sentinel", {"x": X[:, :7]}, as_json=as_json)
    assert "unexpected shape for input 'x' for model 'sentinel'. Expected [-1,8], got [3,7]" in text


def test_a_wrong_datatype(sdk):
    text = refusal(sdk, 400, "INVALID_ARGUMENT", "sentinel", {"x": X.astype(np.float64)})
    assert "inference input 'x' data-type is 'FP64', but model 'sentinel' expects 'FP32'" in text


def test_a_missing_and_an_unknown_input(sdk):
    text = refusal(sdk, 400, "INVALID_ARGUMENT", "sum_rows", {"INPUT0": A})
    assert "expected 2 inputs but got 1 inputs for model 'sum_rows'" in text
    text = refusal(sdk, 400, "INVALID_ARGUMENT", "sentinel", {"x": X, "z": X})
    assert "unexpected inference input 'z' for model 'sentinel'" in text


def test_an_unknown_output(sdk):
    text = refusal(sdk, 400, "INVALID_ARGUMENT", "sentinel", {"x": X}, outputs=["z"])
    assert "unexpected inference output 'z' for model 'sentinel'" in text


def test_what_is_not_offered(sdk):
    text = refusal(sdk, 501, "UNIMPLEMENTED", "sentinel", {"x": X}, parameters={"sequence_id": 7})
    assert "parameter `sequence_id` of the request is not supported" in text


def test_an_expired_timeout(sdk):
    text = refusal(sdk, 504, "DEADLINE_EXCEEDED", "sentinel", {"x": X}, parameters={"timeout": 1})
    assert "Request timeout expired" in text


def test_one_bad_request_among_many_fails_alone(sdk):
    requests = [("sentinel", {"x": X if i % 4 else X[:, :7]}, {}) for i in range(32)]
    outcomes = sdk.infer_all(requests)
    assert [isinstance(outcome, Refused) for outcome in outcomes] == [i % 4 == 0 for i in range(32)]
