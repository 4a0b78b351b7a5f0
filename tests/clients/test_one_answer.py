"""One engine behind every way in: the same request by every client and every representation, one at a time, gets the
same bits; where JSON is between, what JSON can say of them, to the last bit.

Answers are compared with those of tritonclient over gRPC. That they are right is test_inference.py's to say.
"""

import json
import subprocess

import grpc
import ml_dtypes
import numpy as np
import pytest
from kserve_sdk import Sdk
from support import (
    BINARY,
    CALL_SECONDS,
    EXAMPLES,
    FIELDS,
    Client,
    datatype,
    environment,
    golden_cases,
    golden_files,
    json_input,
    json_outputs,
    require,
    same_bits,
    to_bytes,
    trap_cases,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype


class Ways:
    """Every way to one server. Each takes (model, version, inputs) and gives {output: array}."""

    def __init__(self, server):
        self.server = server
        self.clients = {kind: Client(kind, server) for kind in ("http", "http_aio", "grpc", "grpc_aio")}
        self.sdks = {"rest": Sdk("rest", server.url), "grpc": Sdk("grpc", server.grpc)}
        self.channel = grpc.insecure_channel(server.grpc, [("grpc.max_receive_message_length", -1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.signatures = {}

    def close(self):
        for client in [*self.clients.values(), self.channel]:
            client.close()

    def signature(self, model):
        if model not in self.signatures:
            self.signatures[model] = self.server.get(f"/v2/models/{model}").json()
        return self.signatures[model]

    # tritonclient.

    def triton(self, kind):
        def ask(model, version, inputs):
            answer = self.clients[kind].infer(model, inputs, version=version)
            return {name: answer[name] for name in answer.names()}

        return ask

    def triton_json(self, model, version, inputs):
        outputs = [self.clients["http"].output(it["name"], as_json=True) for it in self.signature(model)["outputs"]]
        answer = self.clients["http"].infer(model, inputs, version=version, outputs=outputs, as_json=True)
        return {name: answer[name] for name in answer.names()}

    # The protocol by hand: what tritonclient cannot or will not send.

    def plain_json(self, model, version, inputs):
        told = json_outputs(self.server.infer(model, inputs, version=version))
        return {name: from_json(*tensor) for name, tensor in told.items()}

    def raw_body(self, model, version, inputs):
        [array] = inputs.values()
        body = b"".join(to_bytes(v) for v in array.flat) if array.dtype == np.object_ else array.tobytes()
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        answer = self.server.post(path, body, headers={"Inference-Header-Content-Length": "0"})
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["inference-header-content-length"])
        told, tail = json.loads(answer.content[:length]), answer.content[length:]
        found = {}
        for output in told["outputs"]:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = from_bytes(output["datatype"], output["shape"], tail[:size])
            tail = tail[size:]
        assert tail == b""
        return found

    def typed_contents(self, model, version, inputs):
        return of_message(self.stub.ModelInfer(typed_request(model, version, inputs), timeout=CALL_SECONDS))

    def stream(self, message):
        def ask(model, version, inputs):
            # One stream, one request: two on a stream may share a batch.
            [answer] = self.stub.ModelStreamInfer(iter([message(model, version, inputs)]), timeout=CALL_SECONDS)
            assert answer.error_message == ""
            return of_message(answer.infer_response)

        return ask

    # The KServe SDK.

    def kserve(self, protocol, as_json):
        def ask(model, version, inputs):
            more = {"version": version} if protocol == "grpc" else {}
            answer = self.sdks[protocol].infer(model, inputs, as_json=as_json, **more)
            return {name: array for name, (_, _, array) in answer.outputs.items()}

        return ask

    # `tidegate infer`.

    def command(self, scheme):
        address = {"http": self.server.http, "grpc": self.server.grpc}[scheme]

        def ask(model, version, inputs):
            request = {"inputs": [json_input(name, array) for name, array in inputs.items()]}
            command = [BINARY, "infer", "--server", f"{scheme}://{address}", model, "--request", "-", "--json"]
            command += ["--version", version] if version else []
            ran = subprocess.run(
                [str(part) for part in command],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=CALL_SECONDS,
                env=environment(),
            )
            assert ran.returncode == 0, ran.stderr
            outputs = json.loads(ran.stdout)["outputs"]
            return {it["name"]: from_json(it["datatype"], it["shape"], it["data"]) for it in outputs}

        return ask

    def all(self, model, version, inputs):
        """{name: (way, whether JSON is on it)} of those that can carry this request."""
        kinds = {datatype(array) for array in inputs.values()}
        kinds |= {output["datatype"] for output in self.signature(model)["outputs"]}
        numbers = all(is_finite(array) for array in inputs.values())
        text = all(is_text(array) for array in inputs.values())
        ways = {kind: (self.triton(kind), False) for kind in self.clients if kind != "grpc"}
        ways["stream"] = (self.stream(raw_request), False)
        if can_be_typed(inputs):
            ways["typed contents"] = (self.typed_contents, False)
            ways["stream, typed contents"] = (self.stream(typed_request), False)
        if self.shape_follows(model, inputs):
            ways["raw body"] = (self.raw_body, False)
        if numbers and text:
            ways["plain JSON"] = (self.plain_json, True)
            ways["tidegate infer, REST"] = (self.command("http"), True)
            ways["tidegate infer, gRPC"] = (self.command("grpc"), True)
            # tritonclient takes half precision in binary only.
            if not kinds & {"FP16", "BF16"}:
                ways["tritonclient, JSON"] = (self.triton_json, True)
        # The KServe SDK has no BF16, and FP16 in binary only.
        if "BF16" not in kinds:
            ways["KServe, gRPC raw"] = (self.kserve("grpc", False), False)
            if "FP16" not in kinds and can_be_typed(inputs) and text:
                ways["KServe, gRPC typed"] = (self.kserve("grpc", True), False)
            # It names no version over REST, and makes text of a binary answer's strings.
            if not version and text:
                ways["KServe, REST binary"] = (self.kserve("rest", False), False)
                if "FP16" not in kinds and numbers:
                    ways["KServe, REST JSON"] = (self.kserve("rest", True), True)
        return ways

    def shape_follows(self, model, inputs):
        """Whether a body alone says what the request is: one input, with at most one free dimension, or one row."""
        if len(self.signature(model)["inputs"]) != 1:
            return False
        [array], [declared] = inputs.values(), self.signature(model)["inputs"]
        free = [axis for axis, dim in enumerate(declared["shape"]) if dim == -1]
        if array.dtype == np.object_:
            return array.size == 1 and len(free) <= 1
        return len(free) <= 1 or (len(free) == 2 and free[0] == 0 and array.shape[0] == 1)


def finite(array):
    with np.errstate(invalid="ignore"):  # a signalling NaN, widened
        return np.isfinite(array.astype(np.float64))


def is_finite(array):
    return array.dtype == np.object_ or bool(finite(array).all())


def is_text(array):
    if array.dtype != np.object_:
        return True
    try:
        return all(to_bytes(value).decode() is not None for value in array.flat)
    except UnicodeDecodeError:
        return False


def can_be_typed(inputs):
    return all(datatype(array) in FIELDS for array in inputs.values())


def raw_request(model, version, inputs):
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version or "")
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        request.raw_input_contents.append(as_bytes(array))
    return request


def typed_request(model, version, inputs):
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version or "")
    for name, array in inputs.items():
        tensor = request.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        values = [to_bytes(v) for v in array.flat] if array.dtype == np.object_ else array.flatten().tolist()
        getattr(tensor.contents, FIELDS[datatype(array)]).extend(values)
    return request


def of_message(response):
    raw = zip(response.outputs, response.raw_output_contents, strict=True)
    return {it.name: from_bytes(it.datatype, it.shape, data) for it, data in raw}


def as_bytes(array):
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(len(v).to_bytes(4, "little") + v for v in map(to_bytes, array.flat))


def numpy_type(kind):
    return ml_dtypes.bfloat16 if kind == "BF16" else triton_to_np_dtype(kind)


def from_bytes(kind, shape, data):
    if kind != "BYTES":
        return np.frombuffer(data, numpy_type(kind)).reshape(shape)
    values = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        values.append(data[4:end])
        data = data[end:]
    return strings(values, shape)


def from_json(kind, shape, data):
    """Of an answer's JSON, where what is no number is null."""
    if kind == "BYTES":
        return strings(data, shape)
    if kind in ("FP64", "FP32", "FP16", "BF16"):
        data = np.array([np.nan if value is None else value for value in data], np.float64).astype(numpy_type(kind))
    return np.array(data, numpy_type(kind)).reshape(shape)


def strings(values, shape):
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array.reshape(shape)


def sayable(array):
    """What is left of an array in JSON: of all that is no number, that it is none."""
    if array.dtype == np.object_ or is_finite(array):
        return array
    return np.where(finite(array), array, np.array(np.nan, array.dtype))


def assert_same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert same_bits(got[name], want[name]), f"{name}: {got[name]!r}, expected {want[name]!r}"


def check(ways, model, version, inputs):
    want = ways.triton("grpc")(model, version, inputs)
    for name, (ask, is_json) in ways.all(model, version, inputs).items():
        expected = {output: sayable(array) if is_json else array for output, array in want.items()}
        got = ask(model, version, inputs)
        # A NaN's own bits are gone with its number.
        got = {output: sayable(array) if is_json else array for output, array in got.items()}
        try:
            assert_same(got, expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def opened(server):
    ways = Ways(server)
    yield ways
    ways.close()


@pytest.fixture(scope="module")
def of_models(models):
    yield from opened(models)


@pytest.fixture(scope="module")
def of_traps(traps):
    yield from opened(traps)


@pytest.mark.parametrize("model, version, path", golden_files(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_example_model(of_models, model, version, path):
    for _, inputs, _, _ in golden_cases(path):
        check(of_models, model, version, inputs)
    if version == max((v for m, v, _ in golden_files() if m == model), key=int):
        check(of_models, model, "", inputs)


@pytest.mark.parametrize("name", trap_cases())
def test_every_trap(of_traps, name):
    require(of_traps.server, name)
    inputs, _ = trap_cases()[name]
    check(of_traps, name, "", inputs)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_datatype(of_traps, name):
    require(of_traps.server, f"identity_{name}")
    x = EXAMPLES[name]
    for array in (x, x[:1], x[:1, :1], x.reshape(3, 2)):
        check(of_traps, f"identity_{name}", "", {"x": array})


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp64"])
def test_numbers_that_are_hard_to_print(of_traps, name):
    """Of the wide types some thousand, from all magnitudes; the shortest decimal of each leads back to it."""
    require(of_traps.server, f"identity_{name}")
    kind = np.dtype(EXAMPLES[name].dtype)
    rng = np.random.default_rng(7)
    x = rng.integers(0, 1 << (8 * kind.itemsize), 4096, np.uint64).astype(f"u{kind.itemsize}").view(kind)
    x = x[finite(x)].reshape(1, -1)
    check(of_traps, f"identity_{name}", "", {"x": x})


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp64"])
def test_what_is_no_number_passes_in_binary(of_traps, name):
    require(of_traps.server, f"identity_{name}")
    kind = np.dtype(EXAMPLES[name].dtype)
    x = np.array([[np.nan, -np.nan, np.inf, -np.inf, -0.0]]).astype(kind)
    check(of_traps, f"identity_{name}", "", {"x": x})


def test_answers_that_are_no_numbers(of_traps):
    """Bits in binary, null in JSON, by every way."""
    check(of_traps, "nan_maker", "", {"x": np.array([[1, 0, -1, -0.0]], np.float32)})
