"""What ragged batching is worth: MiniLM at mixed lengths, batched against unbatched, paired in one run.

Both servers run side by side and take turns under the same load, so that a noisy machine disturbs both alike; the
figure is the median of the turns' ratios. After `make test`: target/clients-venv/bin/python benches/ragged.py [engine]
"""

import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

CLIENTS = pathlib.Path(__file__).resolve().parents[1] / "tests/clients"
sys.path.insert(0, str(CLIENTS))

import test_minilm as minilm  # noqa: E402
from support import Client, Server  # noqa: E402

TURNS, REQUESTS, AT_ONCE = 7, 200, 32
SHORTEST, LONGEST = 4, 48


def registry(folder, engine, batching):
    weights = minilm.fetched_weights()
    for path, content in minilm.model_files(weights, engine).items():
        path = folder / "minilm" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with open(folder / "minilm/model.toml", "a") as settings:
        settings.write(f"batching = {batching}\n")
    return folder


def sequences():
    rng = np.random.default_rng(3)
    lengths = rng.integers(SHORTEST, LONGEST + 1, REQUESTS)
    return [minilm.request(minilm.tokens(rng, length)) for length in lengths]


def per_second(client, requests):
    begun = time.monotonic()
    failed = [answer for answer in client.infer_all("minilm", requests, AT_ONCE) if isinstance(answer, Exception)]
    assert not failed, failed[0]
    return len(requests) / (time.monotonic() - begun)


def main(engine):
    requests = sequences()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        servers = [Server(registry(folder / on, engine, on)) for on in ('"auto"', "false")]
        clients = [Client("grpc_aio", server) for server in servers]
        for client in clients:
            per_second(client, requests)
        turns = [[per_second(client, requests) for client in clients] for _ in range(TURNS)]
        samples = servers[0].scrape()
        for closing in (*(client.close for client in clients), *(server.stop for server in servers)):
            closing()
    ratio = statistics.median(batched / alone for batched, alone in turns)
    batched, alone = (statistics.median(rates) for rates in zip(*turns))
    positions = {kind: samples.total("tidegate_sequence_positions_total", kind=kind) for kind in ("data", "padding")}
    rows = samples.total("tidegate_inferences_total") / samples.total("tidegate_executions_total")
    print(f"{engine}: {batched:.0f} batched, {alone:.0f} unbatched sequences a second, ratio {ratio:.2f}")
    print(f"{rows:.1f} rows a batch, padding {positions['padding'] / sum(positions.values()):.1%} of what was computed")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "onnxruntime")
