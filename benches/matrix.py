"""The benchmarks' matrix: models × protocols × clients against what engine and transport could do, in one run.

`make bench`; `QUICK=1` is a glance at every part of it, `FRESH=1` forgets what was measured before. Every comparison is
of two servers that take turns, round by round, under one client (`tidegate bench`): what is told are medians of the
rounds' ratios with their interval at 95 %. What was measured is kept in target/bench-results.json as it comes, so that
a run that was cut off goes on where it was; another binary or other models start afresh. docs/performance.md is written
in the end.

Against the ceiling, the engine alone takes turns with them in the layout that an exhaustive search found.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import models
import performance
import ratios
from serving import BINARY, REPOSITORY, Server, before_others, environment, never_waiting, say, set_priority, stop

TARGET = REPOSITORY / "target"
RESULTS, RESULTS_QUICK = TARGET / "bench-results.json", TARGET / "bench-results-quick.json"
DATA, CACHE = TARGET / "bench-data", TARGET / "bench-cache"
EXAMPLES = REPOSITORY / "models"
SOURCES = [REPOSITORY / "benches" / name for name in ("models.py", "requirements.txt")]

PROTOCOLS = ("json", "binary", "grpc")
CLIENTS = (1, 8, 32, 64)
ITEMS = 4  # different requests of a workload; large ones are one
LARGE_BYTES = 100_000
SHARING = (8, 32)  # clients, where a fixed setting for many is of use
CELL_SECONDS = 600
QUIET_RATE, QUIET_SECONDS, GREEDY_CLIENTS = 50, 3, 16


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    model: str
    lengths: tuple = (None,)  # tokens of a request, in turn
    seconds: float = 0.4  # of a round: long enough for some tens of requests
    # Of requests that short, so many rounds of half the length for one where two servers are compared: what tells them
    # apart is less than the machine's phases, which last longer than a round.
    finer: int = 1

    def data(self):
        """A folder with one request a file."""
        folder = DATA / self.name
        items = [models.request(self.model, self.lengths[i % len(self.lengths)], i) for i in range(self.items())]
        shutil.rmtree(folder, ignore_errors=True)  # of other requests than these
        folder.mkdir(parents=True)
        for i, item in enumerate(items):
            (folder / f"{i}.json").write_text(models.as_json(item))
        return folder

    def items(self):
        one = models.request(self.model, self.lengths[0])
        large = sum(array.nbytes for array in one.values()) > LARGE_BYTES
        return 1 if large else max(ITEMS, len(self.lengths))


WORKLOADS = [
    Workload("mlp", "mlp", seconds=0.3, finer=3),
    Workload("digits_cnn", "digits_cnn", seconds=0.3, finer=3),
    Workload("encoder_32", "encoder", (32,), seconds=0.5),
    Workload("encoder_128", "encoder", (128,), seconds=0.8),
    Workload("mobilenet", "mobilenet", seconds=0.5),
    Workload("identity_1mib", "identity_1mib", seconds=0.3, finer=3),
]
# Only against batching switched off and the best fixed setting: what changes there is how requests share batches.
MIXED = Workload("encoder_mixed", "encoder", (8, 24, 48, 100, 16, 128, 12, 64), seconds=0.6)


@dataclasses.dataclass(frozen=True)
class Effort:
    rounds: int
    scale: float  # of a round's seconds
    workloads: tuple
    protocols: tuple
    clients: tuple
    starts: int

    def finer(self, times):
        """So many rounds of half the length for one."""
        return self if times == 1 else dataclasses.replace(self, rounds=times * self.rounds, scale=self.scale / 2)


FULL = Effort(11, 1.0, tuple(WORKLOADS), PROTOCOLS, CLIENTS, 5)
QUICK = Effort(3, 0.5, (WORKLOADS[0], WORKLOADS[2]), ("binary",), (1, 8), 2)


class Results:
    """What was measured, by key, on disk after every cell."""

    def __init__(self, path, fresh, more=()):
        """`more`: files that decide what is measured, beside those that make the models and their requests."""
        self.path = path
        self.measured = {}
        sources = b"".join(file.read_bytes() for file in (*SOURCES, *more)) + repr((WORKLOADS, MIXED)).encode()
        sources = hashlib.sha256(sources).hexdigest()
        about = {"binary": hashlib.sha256(BINARY.read_bytes()).hexdigest(), "sources": sources}
        if path.exists() and not fresh:
            kept = json.loads(path.read_text())
            # What was kept before sources were told counts as theirs.
            if about == {"sources": sources} | {key: kept["about"][key] for key in about if key in kept["about"]}:
                self.measured, about = kept["measured"], kept["about"] | about
            else:
                say("another binary, other models or requests than last time: everything is measured again")
        self.about = about

    def keep(self, key, value):
        self.measured[key] = value
        self.save()

    def save(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"about": self.about, "measured": self.measured}, indent=1))
        partial.replace(self.path)


class Servers:
    """One for each way to serve, started when it is first asked for. They are idle while another is measured."""

    def __init__(self):
        self.open, self.stack = {}, contextlib.ExitStack()
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=TARGET)))

    def get(self, name, settings=None, model=None, **variables):
        """`model`: only that one, which is enough where settings are its own."""
        if name not in self.open:
            registry = models.FOLDER
            if settings is not None:
                registry = models.linked(self.folder / name, [model] if model else models.MODELS, settings)
            self.open[name] = self.stack.enter_context(Server(registry, CACHE, **variables))
        return self.open[name]

    def close(self, name):
        if name in self.open:
            self.open.pop(name).stop()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)


# --- the load generator ------------------------------------------------------------------------------


def bench(*arguments):
    """`tidegate bench`, and what it wrote as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [BINARY, "bench", *arguments, "--json", report]
        done = subprocess.run(
            [str(part) for part in command],
            env=environment(CACHE),
            capture_output=True,
            text=True,
            timeout=CELL_SECONDS,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(report.read_text())


def side(measured):
    """One server's rounds in one cell; what a round without answers has no figure for is 0."""
    rounds = lambda estimate: [value or 0.0 for value in (estimate or {"rounds": []})["rounds"]]  # noqa: E731
    return {
        "per_second": rounds(measured["throughput"]),
        "p50": rounds(measured["latency_ms"]["p50"]),
        "p99": rounds(measured["latency_ms"]["p99"]),
        "client_us": rounds(measured["client_cpu_us"]),
        "server_us": rounds(measured["server_cpu_us"]),
        "errors": sum(errors["count"] for errors in measured["errors"]),
    }


def pair(effort, workload, protocol, clients, server, other=None, *more):
    """Two servers in turns: the second is the bare echo where none is given."""
    other = ["--echo"] if other is None else ["--compare", f"{other.url},{other.grpc}", "--compare-pid", other.pid]
    report = bench(
        *("--url", server.url, "--grpc-url", server.grpc, "--server-pid", server.pid, *other, *more),
        *("--model", workload.model, "--data", workload.data(), "--protocol", protocol, "--concurrency", clients),
        *("--rounds", effort.rounds, "--duration", f"{round(1000 * effort.scale * workload.seconds)}ms"),
        *("--warm-up", f"{1 + 2 * workload.seconds}s"),
    )
    [cell] = report["cells"]
    ours, theirs = cell["sides"]
    return {"ours": side(ours), "theirs": side(theirs)} | ({"engine": alone(cell["engine"])} if "engine" in cell else {})


def quiet_beside_greedy(effort, server, at_once=False):
    """A model that is asked now and then, alone and while two others are asked without end.

    `at_once`: neither its client nor what serves it waits for the kernel to give it a core: what is left is the
    server's own doing.
    """
    quiet, greedy = WORKLOADS[1], (WORKLOADS[2], WORKLOADS[4])
    asked = ["--url", server.url, "--protocol", "binary"]
    now_and_then = ["--rate", QUIET_RATE, "--rounds", 1, "--warm-up", "0s"]
    now_and_then += ["--duration", f"{QUIET_SECONDS * effort.scale}s"]
    sides = {"alone": [], "beside": []}
    for number in range(effort.rounds):
        for where in ("alone", "beside") if number % 2 else ("beside", "alone"):
            serving = never_waiting(server.pid, ("io", quiet.model)) if at_once else contextlib.nullcontext()
            with asking(server, greedy if where == "beside" else ()), serving:
                report = bench(*asked, *now_and_then, "--model", quiet.model, "--data", quiet.data(), "--seed", number)
            sides[where] += side(report["cells"][0]["sides"][0])["p99"]
    return sides


@contextlib.contextmanager
def asking(server, workloads):
    """Each workload by clients of its own, all the time."""
    processes = []
    for workload in workloads:
        command = [BINARY, "bench", "--url", server.url, "--model", workload.model, "--data", workload.data()]
        command += ["--concurrency", GREEDY_CLIENTS, "--rounds", 1, "--duration", f"{CELL_SECONDS}s", "--warm-up", "0s"]
        unread = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen([str(part) for part in command], **unread, process_group=0))
    try:
        time.sleep(1.0 if processes else 0.0)
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a greedy client has ended")
        yield
    finally:
        for process in processes:
            stop(process)


def alone(engine):
    """The engine's rounds beside the servers'."""
    setting = {name: engine[name] for name in ("rows", "instances", "threads")}
    rounds = {"rows_per_second": engine["rows_per_second"]["rounds"], "p50": engine["p50_ms"]["rounds"]}
    return setting | rounds


def engine_alone(effort, workload):
    """Every sensible batch × instances × threads of the engine without a server."""
    report = bench(
        *("--in-process", models.FOLDER / workload.model, "--rounds", 1),
        *("--duration", f"{round(1000 * effort.scale * workload.seconds)}ms"),
        *(["--lengths", workload.lengths[0]] if workload.lengths[0] else []),
    )
    [ceiling] = report["ceilings"]
    figures = {"rows_per_second": "rows_per_second", "p50": "p50_ms"}
    return [
        {name: cell[name] for name in ("rows", "instances", "threads")}
        | {name: cell[said]["median"] for name, said in figures.items()}
        for cell in ceiling["cells"]
    ]


# --- what is measured --------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    key: str
    seconds: float  # about
    run: object


def fixed_settings(cell):
    """A `model.toml` that leaves the server nothing to choose."""
    filled = f"[batching]\npreferred_rows = {cell['rows']}\ntune = false\n"
    batching = filled if cell["rows"] > 1 else "batching = false\n"
    return f"instances = {cell['instances']}\nthreads = {cell['threads']}\n{batching}"


class Plan:
    def __init__(self, effort, results, servers):
        self.effort, self.results, self.servers = effort, results, servers

    def steps(self):
        yield from self.starting()
        for workload in self.effort.workloads:
            yield from self.ceilings(workload)
            yield from self.comparisons(workload)
        seconds = self.effort.rounds * (2 * QUIET_SECONDS * self.effort.scale + 2.5)
        yield Step("fair/quiet beside two greedy", seconds, lambda: quiet_beside_greedy(self.effort, self.tuned()))
        if set_priority(0, 1) and set_priority(0, 0):
            at_once = lambda: quiet_beside_greedy(self.effort, self.tuned(), at_once=True)  # noqa: E731
            yield Step("fair/the same at real-time priority", seconds, at_once)
        if any(workload.model == MIXED.model for workload in self.effort.workloads):
            yield from self.comparisons(MIXED)

    def cell_seconds(self, workload, effort):
        # A round has a lead of 0.2 s; warming up takes some windows of as much.
        return 2 * (effort.rounds * (effort.scale * workload.seconds + 0.22) + 1)

    def tuned(self):
        return self.servers.get("tuned")

    def ceilings(self, workload):
        seconds = self.effort.scale * workload.seconds
        key = f"engine/{workload.name}"
        yield Step(key, 18 * seconds + 2, lambda: engine_alone(self.effort, workload))
        for protocol in self.effort.protocols:
            for clients in self.effort.clients:
                yield self.of_ceiling(workload, protocol, clients)

    def of_ceiling(self, workload, protocol, clients):
        """Beside the echo, and the engine in its best layout: for a lone client, the one that answers one row soonest."""

        def run():
            cells = self.results.measured[f"engine/{workload.name}"]
            best = ratios.best_single(cells) if clients == 1 else ratios.best_cell(cells)
            layout = "x".join(str(best[name]) for name in ("rows", "instances", "threads"))
            engine = ("--engine-of", models.FOLDER / workload.model, "--engine-layout", layout)
            return pair(self.effort, workload, protocol, clients, self.tuned(), None, *engine)

        seconds = 1.5 * self.cell_seconds(workload, self.effort) + 2
        return Step(f"echo/{workload.name}/{protocol}/{clients}", seconds, run)

    def compared(self, name, workload, protocol, clients, other):
        effort = self.effort.finer(workload.finer)

        def run():
            return pair(effort, workload, protocol, clients, self.tuned(), other())

        return Step(f"{name}/{workload.name}/{protocol}/{clients}", self.cell_seconds(workload, effort), run)

    def comparisons(self, workload):
        """What does not depend on the protocol, over the one that costs the client least."""
        for clients in self.effort.clients:
            yield self.compared("unbatched", workload, "binary", clients, self.unbatched)
        if workload is not MIXED:
            for clients in self.effort.clients:
                yield self.compared("unmonitored", workload, "binary", clients, self.unmonitored)
        for clients in self.effort.clients:
            if clients in SHARING:
                yield self.compared("fixed", workload, "binary", clients, lambda: self.fixed(workload))

    def unbatched(self):
        return self.servers.get("unbatched", "batching = false\n")

    def unmonitored(self):
        return self.servers.get("unmonitored", TIDEGATE_MONITORING="false")

    def fixed(self, workload):
        """On what the exhaustive search found; for mixed lengths, on what it found for the longest."""
        searched = "encoder_128" if workload is MIXED else workload.name
        cells = self.results.measured.get(f"engine/{searched}") or self.results.measured["engine/encoder_32"]
        return self.servers.get(f"fixed-{searched}", fixed_settings(ratios.best_cell(cells)), workload.model)

    def starting(self):
        """Before anything else runs."""
        # Only what is asked for, and nothing is.
        yield Step("start/empty", 2, lambda: started(EXAMPLES, 1, "--model-control", "explicit"))
        for name, registry in (("examples", EXAMPLES), ("matrix", models.FOLDER)):
            yield Step(f"start/{name}", 6 * self.effort.starts, lambda r=registry: started(r, self.effort.starts))
        for model in dict.fromkeys(workload.model for workload in self.effort.workloads):
            registry = self.servers.folder / f"only-{model}"
            yield Step(f"start/{model}", 4, lambda r=registry, m=model: started(models.linked(r, [m]), 1))


def started(registry, times, *flags):
    """Seconds until ready, with nothing remembered and then with what the first start left; memory then."""
    first, second, held = [], [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=TARGET) as cache:
            for seconds in (first, second):
                with Server(registry, cache, *flags, TIDEGATE_LAME_DUCK="0s") as server:
                    seconds.append(server.seconds_to_ready)
                    held.append(server.memory())
    return {"first": first, "second": second, "memory": held}


# --- the run -----------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Measure the matrix and write docs/performance.md.")
    parser.add_argument("--only", default="", help="keys that begin with one of these, with commas between")
    parser.add_argument("--report", action="store_true", help="write the page from what was measured, and no more")
    options = parser.parse_args()
    failed = 0
    quick, fresh = os.environ.get("QUICK", "") == "1", os.environ.get("FRESH", "") == "1"
    effort = QUICK if quick else FULL
    results = Results(RESULTS_QUICK if quick else RESULTS, fresh)
    if not options.report:
        models.write()
        with before_others() as raised, Servers() as servers:
            results.about |= performance.surroundings() | {"raised": raised, "rounds": effort.rounds}
            failed = measure(Plan(effort, results, servers), results, tuple(options.only.split(",")))
        shutil.rmtree(CACHE, ignore_errors=True)
    page = performance.matrix(results.about, results.measured)
    if quick:
        print(page)
    else:
        performance.put("matrix", page)
        say(f"written to {performance.PAGE.relative_to(REPOSITORY)}")
    if failed:
        raise SystemExit(f"{failed} measurements failed; the next run tries them again")


def measure(plan, results, only):
    steps = [step for step in plan.steps() if step.key.startswith(only)]
    todo = [step for step in steps if step.key not in results.measured]
    say(f"{len(steps)} measurements, {len(steps) - len(todo)} of them kept; about {minutes(todo)} to go")
    begun, planned, failed = time.monotonic(), 0.0, 0
    for number, step in enumerate(todo):
        planned += step.seconds
        try:
            results.keep(step.key, step.run())
        # What a failed cell would have told is missing for those that build on it.
        except (RuntimeError, subprocess.TimeoutExpired, KeyError, StopIteration) as error:
            failed += 1
            say(f"[{number + 1}/{len(todo)}] {step.key} failed: {type(error).__name__}: {error}")
            continue
        # What steps took so far, against what they were expected to.
        pace = (time.monotonic() - begun) / planned
        left = minutes(todo[number + 1 :], pace)
        say(f"[{number + 1}/{len(todo)}] {performance.line(step.key, results.measured[step.key])}; {left} to go")
    return failed


def minutes(steps, pace=1.0):
    return f"{sum(step.seconds for step in steps) * pace / 60:.0f} min"


if __name__ == "__main__":
    main()
