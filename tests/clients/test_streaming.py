"""Streams of requests by tritonclient: order, errors in their place, cancellation; and reflection."""

import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import CALL_SECONDS, Client, datatype
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException


def rows(i):
    """As many rows as make some answers long, and a first element that says whose they are."""
    x = np.zeros((20_000 if i % 10 == 9 else i % 3 + 1, 8), np.float32)
    x[0, 0] = i
    return x


def inputs(array, name="x"):
    made = tritonclient.grpc.InferInput(name, list(array.shape), datatype(array))
    return [made.set_data_from_numpy(array)]


class Stream:
    """tritonclient's callback stream, its answers in a queue."""

    def __init__(self, server, **more):
        self.client = tritonclient.grpc.InferenceServerClient(server.grpc)
        self.answers = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)), **more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.stop_stream()
        self.client.close()

    def send(self, model, array, request_id="", **more):
        self.client.async_stream_infer(model, inputs(array), request_id=request_id, **more)

    def next(self):
        return self.answers.get(timeout=CALL_SECONDS)


def test_many_requests_are_answered_in_order(traps):
    with Stream(traps) as stream:
        for i in range(150):
            stream.send("sentinel", rows(i), str(i))
        predictions = set()
        for i in range(150):
            result, error = stream.next()
            assert error is None, error
            response = result.get_response()
            assert response.id == str(i)
            np.testing.assert_array_equal(result.as_numpy("y"), rows(i) * 2 + 1)
            predictions.add(response.parameters["prediction_id"].string_param)
        assert len(predictions) == 150


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_streams(traps, compression):
    with Stream(traps, compression_algorithm=compression) as stream:
        for i in (1, 9):
            stream.send("sentinel", rows(i))
            result, error = stream.next()
            assert error is None, error
            np.testing.assert_array_equal(result.as_numpy("y"), rows(i) * 2 + 1)


def test_errors_keep_their_place_and_the_stream_goes_on(traps):
    with Stream(traps) as stream:
        stream.send("sentinel", rows(0), "0")
        stream.send("nope", rows(1), "1")
        stream.send("sentinel", np.zeros((1, 9), np.float32), "2")
        stream.send("sentinel", rows(3), "3")
        messages = [error and error.message() for _, error in (stream.next() for _ in range(4))]
    assert messages[0] is None and messages[3] is None
    assert messages[1] == "Request for unknown model: 'nope' is not found"
    assert messages[2].startswith("unexpected shape for input 'x' for model 'sentinel'")


def test_the_first_error_is_the_status_for_those_who_ask(traps):
    with Stream(traps, headers={"triton_grpc_error": "true"}) as stream:
        stream.send("sentinel", rows(0))
        assert stream.next()[1] is None
        stream.send("nope", rows(1))
        _, error = stream.next()
        assert error.status() == "StatusCode.NOT_FOUND"


def test_the_only_answer_is_the_last(traps):
    with Stream(traps) as stream:
        for asked in (True, False):
            stream.send("sentinel", rows(0), enable_empty_final_response=asked)
            result, error = stream.next()
            assert error is None, error
            parameters = result.get_response().parameters
            assert ("triton_final_response" in parameters) is asked
            assert not asked or parameters["triton_final_response"].bool_param
    assert stream.answers.empty()


def test_a_stream_is_over_when_its_time_is(traps):
    with Stream(traps, stream_timeout=0.5) as stream:
        stream.send("sentinel", rows(0))
        assert stream.next()[1] is None
        assert stream.next()[1].status() == "StatusCode.DEADLINE_EXCEEDED"


def test_stream_infer(traps):
    """The asyncio client's stream."""
    client = Client("grpc_aio", traps)

    async def requests():
        for i in range(50):
            yield {"model_name": "nope" if i == 7 else "sentinel", "inputs": inputs(rows(i)), "request_id": str(i)}

    async def run():
        i = 0
        async for result, error in client.raw.stream_infer(requests(), stream_timeout=CALL_SECONDS):
            assert (error is not None) is (i == 7), error
            if result is not None:
                assert result.get_response().id == str(i)
                np.testing.assert_array_equal(result.as_numpy("y"), rows(i) * 2 + 1)
            i += 1
        return i

    try:
        assert client.wait(run()) == 50
    finally:
        client.close()


def test_one_prediction_on_a_stream_and_alone(models):
    """The same bits, and the same record."""
    image = np.linspace(0, 16, 64, dtype=np.float32).reshape(1, 64)
    made = tritonclient.grpc.InferInput("image", [1, 64], "FP32").set_data_from_numpy(image)
    before = models.scrape().total("tidegate_requests_total", protocol="grpc", model="digits", outcome="ok")
    with Stream(models) as stream:
        stream.client.async_stream_infer("digits", [made])
        result, error = stream.next()
        assert error is None, error
        alone = stream.client.infer("digits", [made])
    np.testing.assert_array_equal(result.as_numpy("probabilities"), alone.as_numpy("probabilities"))
    after = models.scrape().total("tidegate_requests_total", protocol="grpc", model="digits", outcome="ok")
    assert after == before + 2


def test_a_refused_request_says_its_id_and_prediction(traps):
    request = service_pb2.ModelInferRequest(model_name="nope", id="mine")
    with grpc.insecure_channel(traps.grpc) as channel:
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=CALL_SECONDS)
        (answer,) = answers
    assert answer.error_message == "Request for unknown model: 'nope' is not found"
    assert answer.infer_response.id == "mine"
    assert answer.infer_response.parameters["prediction_id"].string_param


# --- reflection ------------------------------------------------------------------------------------


def test_reflection(traps):
    """By grpcio's own client: what it finds is enough to build messages and call with them."""
    with grpc.insecure_channel(traps.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        methods = {method.name for method in service.methods}
        assert {"ModelInfer", "ModelStreamInfer", "ServerMetadata"} <= methods
        described = {f.name: f.number for f in pool.FindMessageTypeByName("inference.ModelInferRequest").fields}
        known = service_pb2.ModelInferRequest.DESCRIPTOR.fields
        assert described == {field.name: field.number for field in known}
        assert pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest").fields_by_name["service"].number == 1


# --- classification --------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True], ids=["binary", "json"])
def test_classes_instead_of_scores(model_client, as_json):
    if as_json and not model_client.is_http:
        pytest.skip("gRPC has no JSON")
    images = np.random.default_rng(7).uniform(0, 16, (5, 64)).astype(np.float32)
    scores = model_client.infer("digits", {"image": images})["probabilities"]

    def asked(count):
        more = {"binary_data": not as_json} if model_client.is_http else {}
        return [model_client.types.InferRequestedOutput("probabilities", class_count=count, **more)]

    for count in (1, 3, 10, 99):
        classes = model_client.infer("digits", {"image": images}, outputs=asked(count), as_json=as_json)["probabilities"]
        assert classes.shape == (5, min(count, 10))
        for row, found in zip(scores, classes, strict=True):
            # Stable, so that equal scores keep their order; labels.txt names each class as its index.
            best = np.argsort(-row, kind="stable")[:count]
            texts = [c.decode() if isinstance(c, bytes) else c for c in found]
            assert texts == [f"{row[i]:.6f}:{i}:{i}" for i in best]
    as_it_is = model_client.infer("digits", {"image": images}, outputs=asked(0))["probabilities"]
    np.testing.assert_array_equal(as_it_is, scores)


def test_classes_without_labels_and_of_what_is_no_score(client):
    def asked(output):
        return [client.types.InferRequestedOutput(output, class_count=2)]

    classes = client.infer("logits", {"x": np.float32([[1, 2, 3, 4]])}, outputs=asked("logits"))["logits"]
    scores = client.infer("logits", {"x": np.float32([[1, 2, 3, 4]])})["logits"][0]
    best = np.argsort(-scores, kind="stable")[:2]
    assert [c.decode() for c in classes[0]] == [f"{scores[i]:.6f}:{i}" for i in best]
    text = np.array([[b"a", b"b"]], np.object_)
    message = client.refused(400, "INVALID_ARGUMENT", "identity_bytes", {"x": text}, outputs=asked("y"))
    assert message == "output 'y' has no classes to rank: its datatype is BYTES, expected a number"


def test_classification_is_listed(client):
    assert "classification" in client.call("get_server_metadata")["extensions"]
