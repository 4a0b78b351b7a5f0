"""The KServe SDK, unmodified, behind plain calls in a process of its own.

Its generated messages have the names of tritonclient's, which protobuf takes once per process: whichever is imported
second fails. So this module imports the SDK in functions that only the child runs, and nothing of tritonclient's.
"""

import asyncio
import concurrent.futures
import functools
import multiprocessing
from dataclasses import dataclass, field

SECONDS = 120  # the first call imports the SDK, with all that it needs to serve


@dataclass
class Answer:
    """What the SDK made of an answer."""

    id: str
    model_name: str
    model_version: str
    parameters: dict
    outputs: dict  # name -> (datatype, shape, array)
    headers: dict = field(default_factory=dict)


class Refused(Exception):
    """The SDK's own exception, by its class, its status and its text."""

    def __init__(self, kind, status, text):
        super().__init__(kind, status, text)
        self.kind, self.status, self.text = kind, status, text


@functools.cache
def child():
    """One for all: to import the SDK takes seconds. It ends with this process."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


class Sdk:
    """One of the SDK's two clients, "rest" or "grpc", for a server."""

    def __init__(self, protocol, url):
        self.protocol = protocol
        self.place = (protocol, url)

    def ask(self, method, *arguments, **more):
        """`is_server_live`, `is_server_ready`, `is_model_ready`."""
        return child().submit(_ask, self.place, method, arguments, more).result(SECONDS)

    def infer(self, model, arrays, **more):
        [answer] = self.infer_all([(model, arrays, more)])
        if isinstance(answer, Refused):
            raise answer
        return answer

    def infer_all(self, requests):
        """All of (model, {name: array}, options) at once, on one client: answers or refusals, in order."""
        return child().submit(_infer_all, self.place, requests).result(SECONDS)


# --- in the child ----------------------------------------------------------------------------------


@functools.cache
def _loop():
    return asyncio.new_event_loop()


@functools.cache
def _client(place):
    """Kept, as an application would: a REST client reads the system's certificates when it is made."""
    import kserve

    protocol, address = place
    if protocol == "grpc":
        return kserve.InferenceGRPCClient(address)
    return kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))


def _run(place, calls):
    """Every call of a list, made of a client, at once."""

    async def run():
        client = _client(place)
        return await asyncio.gather(*(call(client) for call in calls), return_exceptions=True)

    return [_plain(outcome) for outcome in _loop().run_until_complete(run())]


def _ask(place, method, arguments, more):
    at = (place[1],) if place[0] == "rest" else ()
    [outcome] = _run(place, [lambda client: getattr(client, method)(*at, *arguments, **more)])
    if isinstance(outcome, Refused):
        raise outcome
    return outcome


def _infer_all(place, requests):
    return _run(place, [lambda client, it=it: _infer(client, place, *it) for it in requests])


async def _infer(client, place, model, arrays, options):
    """Options: `as_json` (REST: JSON both ways; gRPC: typed fields), `outputs`, `request_id`, `parameters`, `version`."""
    from kserve import InferInput, InferRequest
    from kserve.protocol.infer_type import RequestedOutput
    from kserve.utils.numpy_codec import from_np_dtype

    as_json = options.get("as_json", False)
    inputs = [InferInput(name, list(array.shape), from_np_dtype(array.dtype)) for name, array in arrays.items()]
    for made, array in zip(inputs, arrays.values()):
        made.set_data_from_numpy(array, binary_data=not as_json)
    parameters = dict(options.get("parameters", {}))
    if place[0] == "rest" and not as_json:
        parameters["binary_data_output"] = True
    request = InferRequest(
        model,
        inputs,
        request_id=options.get("request_id"),
        parameters=parameters or None,
        request_outputs=[RequestedOutput(name) for name in options.get("outputs", [])] or None,
        model_version=options.get("version"),
    )
    if place[0] == "grpc":
        return _answer(await client.infer(request), {})
    headers = {}
    answer = await client.infer(place[1], request, model_name=model, response_headers=headers)
    return _answer(answer, headers)


def _answer(response, headers):
    from kserve.protocol.infer_type import to_http_parameters

    outputs = {it.name: (it.datatype, list(it.shape), it.as_numpy()) for it in response.outputs}
    parameters = to_http_parameters(response.parameters or {})
    return Answer(response.id, response.model_name, response.model_version, parameters, outputs, dict(headers))


def _plain(outcome):
    """What can leave the process: the SDK's exceptions hold connections."""
    import grpc
    import httpx

    if isinstance(outcome, httpx.HTTPStatusError):
        return Refused(type(outcome).__name__, outcome.response.status_code, str(outcome))
    if isinstance(outcome, grpc.RpcError):
        return Refused(type(outcome).__name__, outcome.code().name, outcome.details())
    if isinstance(outcome, Exception):
        return Refused(type(outcome).__name__, None, str(outcome))
    return outcome
