"""The ONNX project's node tests through a real server, all of them in it at once, over REST and gRPC.

    make conformance
    target/clients-venv/bin/python tests/clients/conformance.py [--engine tract] [--bless]

Fails where a case that ONNX Runtime passes in process, and whose tensors the protocol can carry, does not pass through
the server; where REST and gRPC differ; and where an engine does worse than `conformance.json` says, which `--bless`
rewrites. `test_conformance.py` asks the same, and measures nothing.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import time

import onnxruntime
import pytest
from node_tests import FOLDER, cases, difference, in_process
from support import ENGINE, REPOSITORY, Client, Server, eventually, same_bits

EXPECTED = pathlib.Path(__file__).with_suffix(".json")
PROTOCOLS = {"http": "REST, binary", "grpc": "gRPC"}
# From best to worst: an answer that is wrong is worse than none.
PASSED, REFUSED, FAILED, WRONG = OUTCOMES = ["passed", "refused", "failed", "wrong"]
IDLE_SECONDS = 6  # three looks at the registry
REST_SECONDS = 60  # a worker lingers for 10


@dataclasses.dataclass
class Outcome:
    kind: str
    reason: str = ""
    answers: dict = dataclasses.field(default_factory=dict)


# --- asking ----------------------------------------------------------------------------------------


def registry(found):
    """A model repository of all cases."""
    folder = FOLDER / "registry"
    shutil.rmtree(folder, ignore_errors=True)
    for case in found:
        version = folder / case.name / "1"
        version.mkdir(parents=True)
        shutil.copyfile(case.model, version / "model.onnx")
    return folder


def refusals(server):
    """{model: why it is not served}."""
    index = server.post("/v2/repository/index").json()
    return {entry["name"]: entry["reason"] for entry in index if entry["state"] != "READY"}


def ask(client, case):
    """What came of one case."""
    try:
        answer = client.infer(case.name, case.inputs)
        answers = {name: answer[name] for name in answer.names()}
    except Exception as error:  # whatever a client makes of an answer
        return Outcome(FAILED, f"{type(error).__name__}: {error}")
    wrong = difference(answers, case.outputs)
    return Outcome(WRONG, wrong, answers) if wrong else Outcome(PASSED, "", answers)


def ask_all(server, carried):
    """{protocol: {case: outcome}}."""
    refused = refusals(server)
    outcomes = {}
    for protocol in PROTOCOLS:
        client = Client(protocol, server)
        try:
            outcomes[protocol] = {
                case.name: Outcome(REFUSED, refused[case.name]) if case.name in refused else ask(client, case)
                for case in carried
            }
        finally:
            client.close()
    return outcomes


def engine_of(server, carried):
    refused = refusals(server)
    return server.engine(next(case.name for case in carried if case.name not in refused))


def failures_in_process(carried):
    """{case: why Python's onnxruntime, of the server's version, does not pass it}."""
    [version] = re.findall(r"^onnxruntime==(\S+)", (REPOSITORY / "scripts/onnxruntime.txt").read_text(), re.M)
    assert onnxruntime.__version__ == version, "the server's onnxruntime is another than Python's"
    return {case.name: why for case in carried if (why := in_process(case))}


# --- judging ---------------------------------------------------------------------------------------


def summary(outcomes):
    """What `conformance.json` holds of an engine: how many cases pass, and which do not."""
    worst = {name: max((by[name].kind for by in outcomes.values()), key=OUTCOMES.index) for name in outcomes["http"]}
    names = {kind: sorted(name for name, found in worst.items() if found == kind) for kind in OUTCOMES}
    return {PASSED: len(names.pop(PASSED))} | names


def expected():
    return json.loads(EXPECTED.read_text())


def lost(outcomes, failures):
    """What passes in process and not through the server."""
    return [
        f"{name}: passes in process, {outcome.kind} over {PROTOCOLS[protocol]}: {first_line(outcome.reason)}"
        for protocol, by_name in outcomes.items()
        for name, outcome in by_name.items()
        if name not in failures and outcome.kind != PASSED
    ]


def unlike(outcomes):
    """What REST and gRPC do not answer alike, to the bit. Wrong answers are not compared: they may be random."""
    rest, grpc = outcomes["http"], outcomes["grpc"]
    for name, one in rest.items():
        other = grpc[name]
        if one.kind != other.kind:
            yield f"{name}: {one.kind} over REST, {other.kind} over gRPC: {first_line(one.reason or other.reason)}"
        elif one.kind == PASSED and not all(same_bits(a, other.answers[output]) for output, a in one.answers.items()):
            yield f"{name}: other bits over REST than over gRPC"


def worse(found, before):
    """What an engine did better when `conformance.json` was written."""

    def ranks(side):
        return {name: OUTCOMES.index(kind) for kind in OUTCOMES[1:] for name in side[kind]}

    then = ranks(before)
    return [
        f"{name}: {OUTCOMES[rank]}, expected {OUTCOMES[then.get(name, 0)]}"
        for name, rank in ranks(found).items()
        if rank > then.get(name, 0)
    ]


def problems(engine, outcomes, failures):
    losses = lost(outcomes, failures) if engine == "onnxruntime" else []
    return losses + list(unlike(outcomes)) + worse(summary(outcomes), expected()[engine])


# --- measuring -------------------------------------------------------------------------------------


def process(server, file):
    return pathlib.Path("/proc", str(server.process.pid), file).read_text()


def resources(server):
    """MiB of memory, and threads."""
    status = dict(line.split(":", 1) for line in process(server, "status").splitlines())
    return int(status["VmRSS"].split()[0]) >> 10, int(status["Threads"])


def cpu_seconds(server):
    user, system = process(server, "stat").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def idle_share(server):
    """What it takes of a core while nobody asks it anything."""
    before = cpu_seconds(server)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(server) - before) / IDLE_SECONDS


def rests(server, threads):
    """Models that nobody asks give their threads back."""

    def check():
        now = resources(server)[1]
        assert now <= threads, f"{now} threads at rest, {threads} before the first request"

    eventually(check, REST_SECONDS)


# --- telling ---------------------------------------------------------------------------------------


def row(count, what):
    print(f"{count:6}  {what}")


def listed(title, lines):
    if lines:
        print(f"{title}:")
        print("\n".join(f"  {line}" for line in lines), end="\n\n")


def first_line(text):
    return text.strip().partition("\n")[0][:160]


def tell_cases(failures, outcomes):
    """Each case that does not pass. Of those that are wrong in process, too, it is not the server that is wrong."""
    for kind in OUTCOMES[1:]:
        named = [(name, outcome) for name, outcome in outcomes["http"].items() if outcome.kind == kind]
        also = {name: " (not passed in process, either)" if name in failures else "" for name, _ in named}
        listed(kind, [f"{name}{also[name]}: {first_line(outcome.reason)}" for name, outcome in named])


def tell_counts(found, carried, failures, engine, outcomes):
    not_carried = collections.Counter(case.not_carried for case in found if case.not_carried)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(not_carried.items()))
    row(len(found), "node tests of the ONNX project, each a model")
    row(len(found) - len(carried), f"have an input or output that the protocol cannot carry: {kinds}")
    row(len(carried), "are carried; of these")
    row(len(carried) - len(failures), f"pass in process, with Python's onnxruntime {onnxruntime.__version__}")
    for protocol, name in PROTOCOLS.items():
        kinds = collections.Counter(outcome.kind for outcome in outcomes[protocol].values())
        others = ", ".join(f"{kinds[kind]} {kind}" for kind in OUTCOMES[1:])
        row(kinds[PASSED], f"pass through the server on {engine} over {name}; {others}")


def run(engine, bless):
    """The exit code."""
    found = cases()
    carried = [case for case in found if not case.not_carried]
    failures = failures_in_process(carried)
    folder = registry(found)
    begun = time.monotonic()
    server = Server(folder, engine=engine)
    ready = time.monotonic() - begun
    try:
        worked = cpu_seconds(server)
        engine = engine_of(server, carried)
        refused = len(refusals(server))
        loaded, idle = resources(server), idle_share(server)
        outcomes = ask_all(server, carried)
        used = resources(server)
        rests(server, loaded[1])
    finally:
        server.stop()
    tell_cases(failures, outcomes)
    tell_counts(found, carried, failures, engine, outcomes)
    print(f"all in one server: {len(found) - refused} models ready and {refused} refused", end=" ")
    print(f"after {ready:.1f} s ({worked:.1f} s of CPU);")
    print("{} MiB and {} threads once loaded, {:.1%} of a core when idle;".format(*loaded, idle), end=" ")
    print("{} MiB and {} threads once all were asked, which go after 10 s".format(*used))
    if bless:
        before = expected() if EXPECTED.exists() else {}
        EXPECTED.write_text(json.dumps(before | {engine: summary(outcomes)}, indent=1, sort_keys=True) + "\n")
    elif summary(outcomes)[PASSED] > expected()[engine][PASSED]:
        print(f"more pass than {EXPECTED.name} says: run with --bless")
    found_wrong = problems(engine, outcomes, failures)
    listed("worse than expected", found_wrong)
    return int(bool(found_wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["onnxruntime", "tract"], default=ENGINE, help="default: as the server picks")
    parser.add_argument("--bless", action="store_true", help=f"rewrite {EXPECTED.name}")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments.engine, arguments.bless))
    except pytest.skip.Exception as unavailable:
        sys.exit(f"conformance: {unavailable}")


if __name__ == "__main__":
    main()
