"""Tidegate beside other servers of the same models: `make bench-peers`.

Each peer lives in an environment of its own below target/peers, made when it is first asked for; one that cannot be
had, or does not come up, is skipped, and said so. Tidegate and the peer take turns under one client. The ratios go to
docs/performance.md. `PEERS=fastapi,mlserver` asks for some; `PEERS_PYTHON` names the Python that environments are made
from: PyTriton brings an interpreter of its own, which does not start with the library of every Python of its version.
"""

import collections
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import matrix
import models
import performance
import ratios
from serving import REPOSITORY, Server, before_others, say, stop

PEERS = REPOSITORY / "benches/peers"
ENVIRONMENTS = REPOSITORY / "target/peers"
RESULTS = REPOSITORY / "target/bench-peers.json"
PYTHON = os.environ.get("PEERS_PYTHON", "python3")
INSTALL_SECONDS, START_SECONDS, ASK_SECONDS = 900, 120, 30
# A peer's errors are told, and no reason to stop.
PATIENTLY = ("--max-errors", 1 << 30, "--timeout", "30s")
EFFORT = matrix.Effort(7, 1.0, (), (), (1, 8, 32), 0)
WORKLOADS = [w for w in matrix.WORKLOADS if w.name in ("mlp", "encoder_32", "mobilenet")]

Peer = collections.namedtuple("Peer", "name shown script protocols")
ALL = [
    Peer("fastapi", "FastAPI + onnxruntime", "fastapi_server.py", ("json",)),
    Peer("litserve", "LitServe", "litserve_server.py", ("json",)),
    Peer("mlserver", "MLServer", "mlserver_runtime.py", ("json", "grpc")),
    Peer("pytriton", "PyTriton", "pytriton_server.py", ("json", "binary", "grpc")),
]


class Unavailable(Exception):
    pass


def installed(peer):
    """Its Python; what is installed is what its file of requirements says."""
    folder, wanted = ENVIRONMENTS / peer.name, PEERS / f"{peer.name}.txt"
    python, stamp = folder / "bin/python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return python
    say(f"{peer.shown}: installing")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", wanted]
    for command in ([PYTHON, "-m", "venv", folder], pip):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"cannot be installed within {INSTALL_SECONDS} s") from None
        if done.returncode != 0:
            raise Unavailable(f"cannot be installed: {last_line(done.stderr or done.stdout)}")
    shutil.copy(wanted, stamp)
    return python


def last_line(text):
    """The last one with a word in it."""
    said = [line.strip() for line in text.splitlines() if re.search(r"[a-zA-Z]{2}", line)]
    return (said or ["it says nothing"])[-1][:200]


class Running:
    """A peer with the workloads' models, answering."""

    def __init__(self, peer, registry, log):
        ports = free_ports(2)
        self.url, self.grpc = (f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(("http", "grpc"), ports))
        self.log = log
        self.process = subprocess.Popen(
            [installed(peer), "-B", PEERS / peer.script, registry, *map(str, ports)],
            cwd=ENVIRONMENTS,  # some leave things behind
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self.pid = self.process.pid
        try:
            for workload in WORKLOADS:
                self.wait(workload)
        except Unavailable:
            self.stop()
            raise

    def wait(self, workload):
        body = next(workload.data().iterdir()).read_bytes()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v2/models/{workload.model}/infer", body, headers)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=ASK_SECONDS):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                said = error
                time.sleep(0.5)
        if self.process.poll() is None:
            raise Unavailable(f"does not answer for {workload.model}: {said}")
        raise Unavailable(f"ended at its start: {last_line(self.log.read_text())}")

    def stop(self):
        # Some leave their workers behind.
        stop(self.process, group=True)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def measure(peer, server, registry, results):
    wanted = [
        (f"{peer.name}/{workload.name}/{protocol}/{clients}", workload, protocol, clients)
        for workload in WORKLOADS
        for protocol in peer.protocols
        for clients in EFFORT.clients
    ]
    todo = [cell for cell in wanted if cell[0] not in results.measured]
    if not todo:
        return
    running = Running(peer, registry, ENVIRONMENTS / f"{peer.name}.log")
    try:
        for key, workload, protocol, clients in todo:
            try:
                cell = matrix.pair(EFFORT, workload, protocol, clients, server, running, *PATIENTLY)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                say(f"{key}: {last_line(str(error))}")
                continue
            results.keep(key, cell)
            say(performance.line(key, cell))
    finally:
        running.stop()


def main():
    chosen = [name for name in os.environ.get("PEERS", "").split(",") if name]
    peers = [peer for peer in ALL if not chosen or peer.name in chosen]
    results = matrix.Results(RESULTS, os.environ.get("FRESH", "") == "1", sorted(PEERS.glob("*.*")))
    results.about.pop("skipped", None)
    models.write()
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with before_others(), tempfile.TemporaryDirectory(dir=REPOSITORY / "target") as folder:
        registry = models.linked(pathlib.Path(folder), [workload.model for workload in WORKLOADS])
        results.about |= performance.surroundings() | {"rounds": EFFORT.rounds}
        with Server(registry, matrix.CACHE) as server:
            for peer in peers:
                try:
                    measure(peer, server, registry, results)
                except Unavailable as error:
                    results.about.setdefault("skipped", {})[peer.shown] = str(error)
                    say(f"{peer.shown} is skipped: it {error}")
        results.save()
    performance.put("peers", table(results))
    say(f"written to {performance.PAGE.relative_to(REPOSITORY)}")


def table(results):
    clients = EFFORT.clients
    rows = []
    for peer in ALL:
        for workload in WORKLOADS:
            for protocol in peer.protocols:
                cells = [results.measured.get(f"{peer.name}/{workload.name}/{protocol}/{count}") for count in clients]
                if any(cells):
                    shown = [times(cell) if cell else performance.MISSING for cell in cells]
                    rows.append([peer.shown, workload.name, performance.SPOKEN[protocol], *shown])
    heads = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    text = performance.where(results.about) + "\n\n"
    text += performance.table(["peer", "model", "protocol", *heads], rows)
    for name, why in results.about.get("skipped", {}).items():
        text += f"\n{name} was skipped: it {why}\n"
    return text


def times(cell):
    theirs = cell["theirs"]["per_second"]
    pairs = ratios.paired(cell["ours"]["per_second"], theirs)
    failed = f", {cell['theirs']['errors']} errors" if cell["theirs"]["errors"] else ""
    return f"{ratios.show(pairs, 1)} × {performance.rate(theirs)}{failed}" if pairs else f"no answer{failed}"


if __name__ == "__main__":
    main()
