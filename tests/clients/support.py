"""What the client tests share: a server process, one face for tritonclient's four clients, goldens, metrics."""

import asyncio
import collections
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import np_to_triton_dtype

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("TIDEGATE_BIN", REPOSITORY / "target/release/tidegate"))
MODELS = REPOSITORY / "models"
TRAPS = REPOSITORY / "tests/traps"
TRAPS_BAD = REPOSITORY / "tests/traps_bad"

# `onnxruntime` or `tract` for every server; without it each picks by itself.
ENGINE = os.environ.get("TIDEGATE_TEST_ENGINE")

START_SECONDS = 600  # every version is loaded, self-tested (2 s at most) and warmed before ready
STOP_SECONDS = 60
CALL_SECONDS = 60
KEPT_LINES = 200


def environment(engine=ENGINE):
    """Nothing configured but the engine, where it is named."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
    return env | ({"TIDEGATE_ENGINE": engine} if engine else {})


class Server:
    """One `tidegate serve` on ports of its own choosing, read from its log line `ready`."""

    def __init__(self, registry, *flags, engine=ENGINE):
        command = [BINARY, "serve", "--registry", registry, "--host", "127.0.0.1", "--log-format", "json", *flags]
        for port in ("http", "grpc", "metrics", "admin"):
            command += [f"--{port}-port", "0"]
        self.lines = collections.deque(maxlen=KEPT_LINES)
        self.ready = None
        self.told = threading.Event()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment(engine),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        # Reads to the end: a full pipe would block the server.
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        if not self.told.wait(START_SECONDS) or self.ready is None:
            self.process.kill()
            self.process.wait()
            raise RuntimeError("the server did not become ready:\n" + "".join(self.lines))
        self.http, self.grpc = self.ready["http"], self.ready["grpc"]
        self.metrics, self.admin = self.ready["metrics"], self.ready["admin"]
        self.url = f"http://{self.http}"

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            fields = log_fields(line)
            if fields.get("message") == "ready" and "http" in fields:
                self.ready = fields
                self.told.set()
        self.told.set()

    def stop(self):
        """SIGTERM must end it by itself, with exit code 0."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.reader.join(STOP_SECONDS)
        assert code == 0, f"exit code {code} after SIGTERM:\n" + "".join(self.lines)

    # Plain HTTP, for what tritonclient hides: headers, statuses, exact bodies.

    def get(self, path, **more):
        return requests.get(self.url + path, timeout=CALL_SECONDS, **more)

    def post(self, path, body=None, **more):
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        return requests.post(self.url + path, data=body, timeout=CALL_SECONDS, **more)

    def infer(self, model, inputs, version=None, headers=None, **more):
        """A JSON request with flat data; `more` joins the body's top level."""
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        return self.post(path, {"inputs": [json_input(n, a) for n, a in inputs.items()], **more}, headers=headers)

    # Metrics.

    def scrape(self):
        response = requests.get(f"http://{self.metrics}/metrics", timeout=CALL_SECONDS)
        assert response.status_code == 200, response.text
        return Samples(response.text)

    def engine(self, model):
        """`onnxruntime` or `tract`."""
        return self.get(f"/v2/models/{model}").json()["platform"].removesuffix("_onnx")


def log_fields(line):
    """A JSON log line's fields, whether they lie at its top or under `fields`; {} for any other line."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(event, dict):
        return {}
    fields = event.get("fields")
    return {**event, **fields} if isinstance(fields, dict) else event


class Samples(dict):
    """One scrape: (sample name, its labels as sorted pairs) -> value."""

    def __init__(self, text):
        self.families = list(text_string_to_metric_families(text))
        super().__init__(
            ((s.name, tuple(sorted(s.labels.items()))), s.value) for f in self.families for s in f.samples
        )

    def select(self, name, **labels):
        """{labels left over, as a dict's sorted pairs: value} of the samples that carry `labels`."""
        wanted = {k: str(v) for k, v in labels.items()}.items()
        return {
            tuple(pair for pair in pairs if pair not in wanted): value
            for (sample, pairs), value in self.items()
            if sample == name and wanted <= dict(pairs).items()
        }

    def total(self, name, **labels):
        return sum(self.select(name, **labels).values())


# --- what is fetched -------------------------------------------------------------------------------

FETCH_SECONDS = 300


def fetched_wheel(requirement, folder, *options):
    """The one wheel that a file of requirements names by its hash, open; it is not installed. `options` are pip's."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*options, "--require-hashes", "--requirement", requirement, "--dest", folder]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
    assert "DO NOT MATCH" not in fetched.stderr, fetched.stderr
    if fetched.returncode != 0:
        pytest.skip(f"the wheel of {requirement.name} cannot be fetched: {fetched.stderr.strip()[-300:]}")
    [wheel] = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


# --- tensors ---------------------------------------------------------------------------------------


def datatype(array):
    return np_to_triton_dtype(array.dtype)


def json_input(name, array):
    data = array.astype(np.float32) if datatype(array) == "BF16" else array
    data = [v.decode() if isinstance(v, bytes) else v for v in data.flatten().tolist()]
    return {"name": name, "shape": list(array.shape), "datatype": datatype(array), "data": data}


def json_outputs(response):
    """The outputs of a JSON answer, by name, as (datatype, shape, flat data)."""
    assert response.status_code == 200, response.text
    return {o["name"]: (o["datatype"], o["shape"], o["data"]) for o in response.json()["outputs"]}


def same_bits(a, b):
    """Equality that tells -0 from 0 and one NaN from another."""
    if a.dtype == np.object_ or b.dtype == np.object_:
        return a.shape == b.shape and [to_bytes(v) for v in a.flat] == [to_bytes(v) for v in b.flat]
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def to_bytes(value):
    return value if isinstance(value, bytes) else str(value).encode()


def extremes(kind):
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        return np.array([[0, 1, limits.max], [limits.min, 2, limits.max - 1]], kind)
    limits = ml_dtypes.finfo(kind)
    values = [0.0, -0.0, 0.1, float(limits.max), float(limits.min), float(limits.tiny)]
    return np.array(values).astype(kind).reshape(2, 3)


# What the model `identity_<name>` returns as it is: the ends of every datatype, as JSON can say them.
EXAMPLES = {
    "bool": np.array([[True, False, True], [False, False, True]]),
    "bytes": np.array([["", "a", "\u00e9\u4e16"], ['"\\\n', "d" * 300, "\U0001f980"]], np.object_),
    "fp16": extremes(np.float16),
    "bf16": extremes(ml_dtypes.bfloat16),
    "fp32": extremes(np.float32),
    "fp64": extremes(np.float64),
    **{t: extremes(np.dtype(t)) for t in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


# --- goldens ---------------------------------------------------------------------------------------

NUMPY_TYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "INT32": np.int32, "BYTES": np.object_}


def golden_files():
    """Every (model, version, expected.json) of the example registry."""
    return sorted((p.parent.parent.name, p.parent.name, p) for p in MODELS.glob("*/*/expected.json"))


def golden_cases(path):
    """(name, inputs, outputs, tolerance) of each case of a version's `expected.json`."""
    golden = json.loads(path.read_text())
    for case in golden["cases"]:
        inputs, outputs = (
            {n: np.array(t["data"], NUMPY_TYPES[t["datatype"]]).reshape(t["shape"]) for n, t in case[side].items()}
            for side in ("inputs", "outputs")
        )
        yield case.get("name", ""), inputs, outputs, golden["tolerance"]


def trap_cases():
    """{trap: (inputs, outputs)}: one sample of each trap, answered by numpy or onnx's reference evaluator."""

    def arrays(tensors):
        return {n: np.array(t["data"], NUMPY_TYPES[t["datatype"]]).reshape(t["shape"]) for n, t in tensors.items()}

    told = json.loads((TRAPS / "expected.json").read_text())
    return {trap: (arrays(case["inputs"]), arrays(case["outputs"])) for trap, case in told.items()}


def assert_close(got, want, tolerance):
    assert got.shape == want.shape
    if want.dtype.kind == "f":
        np.testing.assert_allclose(got, want, rtol=tolerance["relative"], atol=tolerance["absolute"])
    else:
        np.testing.assert_array_equal(got, want)


# --- clients ---------------------------------------------------------------------------------------

CLIENTS = ["http", "http_aio", "grpc", "grpc_aio"]


class Client:
    """tritonclient's four clients behind one face. An aio client runs on an event loop kept for it."""

    def __init__(self, kind, server):
        self.kind = kind
        self.is_http = kind.startswith("http")
        self.is_aio = kind.endswith("aio")
        # Inputs and requested outputs are the same classes for a protocol's two clients.
        self.types = tritonclient.http if self.is_http else tritonclient.grpc
        module = {
            "http": tritonclient.http,
            "http_aio": tritonclient.http.aio,
            "grpc": tritonclient.grpc,
            "grpc_aio": tritonclient.grpc.aio,
        }[kind]
        self.loop = asyncio.new_event_loop() if self.is_aio else None
        url = server.http if self.is_http else server.grpc

        async def connect():
            return module.InferenceServerClient(url)

        self.raw = self.loop.run_until_complete(connect()) if self.is_aio else module.InferenceServerClient(url)

    def wait(self, result):
        return self.loop.run_until_complete(result) if inspect.isawaitable(result) else result

    def call(self, method, *args, **more):
        """Any method of the client; messages come back as plain dicts from both protocols."""
        if not self.is_http and method.startswith("get_"):
            more["as_json"] = True
        return self.wait(getattr(self.raw, method)(*args, **more))

    def inputs(self, arrays, as_json=()):
        """InferInputs of {name: array}; those named in `as_json` (or all, for True) travel as JSON."""
        made = []
        for name, array in arrays.items():
            made.append(self.types.InferInput(name, list(array.shape), datatype(array)))
            if self.is_http:
                json_too = as_json if isinstance(as_json, bool) else name in as_json
                made[-1].set_data_from_numpy(array, binary_data=not json_too)
            else:
                made[-1].set_data_from_numpy(array)
        return made

    def output(self, name, as_json=False):
        if self.is_http:
            return self.types.InferRequestedOutput(name, binary_data=not as_json)
        return self.types.InferRequestedOutput(name)

    def start(self, model, arrays, version="", outputs=None, as_json=(), **more):
        """The call itself: a result, or an awaitable for an aio client."""
        asked = outputs and [self.output(o) if isinstance(o, str) else o for o in outputs]
        return self.raw.infer(model, self.inputs(arrays, as_json), model_version=version, outputs=asked, **more)

    def infer(self, model, arrays, **more):
        return Answer(self.wait(self.start(model, arrays, **more)), self.is_http)

    def infer_all(self, model, requests, at_once=64):
        """Every request of a list of {name: array}, `at_once` in flight; answers or exceptions, in order."""

        async def run():
            gate = asyncio.Semaphore(at_once)

            async def one(arrays):
                async with gate:
                    try:
                        return Answer(await self.start(model, arrays), self.is_http)
                    except tritonclient.utils.InferenceServerException as error:
                        return error

            return await asyncio.gather(*(one(arrays) for arrays in requests))

        return self.loop.run_until_complete(run())

    def refused(self, http, grpc, model, arrays, **more):
        """The message of an inference that must fail with this HTTP status, or this gRPC one."""
        with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
            self.infer(model, arrays, **more)
        wanted = str(http) if self.is_http else f"StatusCode.{grpc}"
        assert caught.value.status() == wanted, str(caught.value)
        return caught.value.message()

    def close(self):
        self.wait(self.raw.close())
        if self.loop:
            self.loop.close()


class Answer:
    """An InferResult of either protocol."""

    def __init__(self, result, is_http):
        self.result, self.is_http = result, is_http
        self.message = result.get_response()

    def __getitem__(self, name):
        array = self.result.as_numpy(name)
        assert array is not None, f"no output '{name}'"
        return array

    def names(self):
        outputs = self.message["outputs"] if self.is_http else self.message.outputs
        return [o["name"] if self.is_http else o.name for o in outputs]

    def field(self, name):
        return self.message.get(name, "") if self.is_http else getattr(self.message, name)

    def parameter(self, name):
        if self.is_http:
            return self.message.get("parameters", {}).get(name)
        parameter = self.message.parameters.get(name)
        return parameter and getattr(parameter, parameter.WhichOneof("parameter_choice"))


def eventually(check, seconds=10):
    """Retries an assertion until it holds: monitoring is written after the answer is sent."""
    end = time.monotonic() + seconds
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


# Typed gRPC contents by datatype; those that have none travel raw.
FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

# What tract refuses to load; onnxruntime serves every trap.
TRACT_LACKS = {"batch_norm_training", "identity_bf16", "random_noise", "reverse_lstm", "slow"}


def require(server, model):
    """Skips where the server runs on tract, which lacks an operator or datatype of this trap."""
    if model in TRACT_LACKS and server.engine("sentinel") == "tract":
        pytest.skip(f"tract does not serve '{model}'")
