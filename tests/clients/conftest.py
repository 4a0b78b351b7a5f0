import pytest
from support import BINARY, CLIENTS, MODELS, TRAPS, TRAPS_BAD, Client, Server


@pytest.fixture(scope="session", autouse=True)
def binary():
    if not BINARY.exists():
        pytest.exit(f"no server at {BINARY}: run `make build`, or set TIDEGATE_BIN", returncode=3)


def serving(registry):
    server = Server(registry)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def models(binary):
    """A server on the example registry."""
    yield from serving(MODELS)


@pytest.fixture(scope="session")
def traps(binary):
    """A server on the trap models."""
    yield from serving(TRAPS)


@pytest.fixture(scope="session")
def traps_bad(binary):
    """A server on models that must be refused: it becomes ready without them."""
    yield from serving(TRAPS_BAD)


def connected(kind, server):
    client = Client(kind, server)
    yield client
    client.close()


@pytest.fixture(scope="module", params=CLIENTS)
def client(request, traps):
    """Each of tritonclient's four clients, on the trap models."""
    yield from connected(request.param, traps)


@pytest.fixture(scope="module", params=["http_aio", "grpc_aio"])
def aio(request, traps):
    """The two clients that can have many requests in flight."""
    yield from connected(request.param, traps)


@pytest.fixture(scope="module", params=CLIENTS)
def model_client(request, models):
    """Each of tritonclient's four clients, on the example registry."""
    yield from connected(request.param, models)
