"""docs/performance.md: what the benchmarks measured, as tables, and which targets that meets."""

import os
import pathlib
import platform
import statistics
import subprocess
import time

import ratios
from serving import BINARY, REPOSITORY

PAGE = REPOSITORY / "docs/performance.md"
PROTOCOLS = ("json", "binary", "grpc")
SPOKEN = {"json": "REST, JSON", "binary": "REST, binary", "grpc": "gRPC"}
MIB = 1 << 20
LARGE_MODELS = ("encoder_32", "encoder_128", "mobilenet")
MISSING = "–"
LEAST_TOLD = 0.02  # of ratios to the bare transport


# --- where it was measured ---------------------------------------------------------------------------


def surroundings():
    def told(*command):
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        except OSError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    fields = dict(
        line.split(":", 1) for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    names = {name.strip(): value.strip() for name, value in fields.items()}
    memory = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) * 1024
    version = BINARY.with_name("onnxruntime.version")
    changed = ", changed" if told("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown") else ""
    dist = REPOSITORY / "target/dist/tidegate"
    return {
        "cpu": names.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "kernel": platform.release().split("-")[0],
        "tidegate": told(BINARY, "--version").removeprefix("tidegate "),
        "revision": told("git", "rev-parse", "--short=12", "HEAD") + changed,
        "onnxruntime": version.read_text().split()[0] if version.exists() else "none: tract",
        "rustc": told("rustc", "--version").split(" (")[0],
        "date": time.strftime("%Y-%m-%d"),
        "sizes": {path.parent.name: path.stat().st_size for path in (BINARY, dist) if path.exists()},
    }


def where(about):
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['memory'] / (1 << 30):.0f} GiB, Linux {about['kernel']}; "
        f"Tidegate {about['tidegate']} at {about['revision']}, {about['rustc']}, ONNX Runtime {about['onnxruntime']}; "
        f"{about['date']}, at least {about['rounds']} rounds a cell. Client and servers share the cores."
    )


# --- tables ------------------------------------------------------------------------------------------


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def rate(per_second):
    median = statistics.median(per_second)
    return f"{median:,.0f}/s" if median >= 100 else f"{median:.1f}/s"


class Measured:
    """Results by what they are of. `None` where something was not measured."""

    def __init__(self, measured):
        self.measured = measured

    def workloads(self, kind):
        return list(dict.fromkeys(key.split("/")[1] for key in self.measured if key.split("/")[0] == kind))

    def clients(self, kind):
        return sorted({int(key.split("/")[3]) for key in self.measured if key.split("/")[0] == kind})

    def cell(self, kind, workload, protocol, clients):
        return self.measured.get(f"{kind}/{workload}/{protocol}/{clients}")

    def ratio(self, kind, workload, protocol, clients):
        cell = self.cell(kind, workload, protocol, clients)
        return cell and ratios.paired(cell["ours"]["per_second"], cell["theirs"]["per_second"])

    def by_cpu(self, kind, workload, clients):
        """The same ratio by what a request costs the servers in CPU time, which neighbours disturb less."""
        cell = self.cell(kind, workload, "binary", clients)
        return cell and ratios.paired(cell["theirs"]["server_us"], cell["ours"]["server_us"])

    def of_ceiling(self, workload, protocol, clients):
        """A lone client's ceiling is the layout that answers one row soonest."""
        cell = self.cell("echo", workload, protocol, clients)
        if not cell:
            return None
        engine = cell["engine"]
        rates = [1000 / p50 for p50 in engine["p50"]] if clients == 1 else engine["rows_per_second"]
        return ratios.of_ceiling(cell["ours"]["per_second"], rates, cell["theirs"]["per_second"])

    def of_single(self, workload, protocol):
        """The latency of a lone client over that of the engine's best layout for a lone row."""
        cell = self.cell("echo", workload, protocol, 1)
        return cell and ratios.paired(cell["ours"]["p50"], cell["engine"]["p50"])


def shown(samples, show=ratios.show):
    return show(samples) if samples else MISSING


def by_clients(m, kind, protocols, show):
    """A row for each workload and protocol, a column for each number of clients."""
    clients = m.clients(kind)
    rows = []
    for workload in m.workloads(kind):
        for protocol in protocols:
            cells = [show(workload, protocol, count) for count in clients]
            if any(cell != MISSING for cell in cells):
                rows.append([workload, *([SPOKEN[protocol]] if len(protocols) > 1 else []), *cells])
    heads = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    return table(["model", *(["protocol"] if len(protocols) > 1 else []), *heads], rows) if rows else ""


def ceilings(m):
    rows = []
    for workload in m.workloads("engine"):
        cells = m.measured.get(f"engine/{workload}")
        if not cells:
            continue
        best, single = ratios.best_cell(cells), ratios.best_single(cells)
        by_threads = {c["threads"]: c["p50"] for c in cells if c["rows"] == 1 and c["instances"] == 1}
        lone = ", ".join(f"{threads}: {p50:.3g} ms" for threads, p50 in sorted(by_threads.items()))
        layout = f"{best['instances']} × {best['threads']}, {best['rows']} rows"
        rows.append([workload, rate([best["rows_per_second"]]), layout, f"{single['p50']:.3g} ms", lone])
    head = ["model", "rows a second", "with instances × threads, batch", "one row alone", "by threads"]
    return table(head, rows) if rows else ""


def starting(m, about):
    rows = []
    empty = m.measured.get("start/empty")
    for key, start in m.measured.items():
        if not key.startswith("start/"):
            continue
        first, second = ([statistics.median(start[when])] for when in ("first", "second"))
        held = {kind: statistics.median(memory[kind] for memory in start["memory"]) for kind in ("rss", "pss")}
        more = f"{(held['pss'] - statistics.median(x['pss'] for x in empty['memory'])) / MIB:+.0f} MiB" if empty else ""
        resident = [f"{held[kind] / MIB:.0f} MiB" for kind in ("rss", "pss")]
        times = [f"{1000 * seconds[0]:.0f} ms" for seconds in (first, second)]
        rows.append([key.removeprefix("start/"), *times, *resident, more])
    if not rows:
        return ""
    head = ["registry", "ready, first start", "second start", "resident", "proportional", "more than empty"]
    sizes = ", ".join(f"{size / MIB:.1f} MiB (`{profile}`)" for profile, size in about.get("sizes", {}).items())
    return table(head, rows) + f"\nThe binary: {sizes}, without ONNX Runtime's library.\n"


def company(m):
    rows = []
    for key, fair in m.measured.items():
        if key.startswith("fair/"):
            alone, beside = (f"{statistics.median(fair[where]):.3g} ms" for where in ("alone", "beside"))
            ratio = ratios.show(ratios.paired(fair["beside"], fair["alone"]))
            rows.append([key.removeprefix("fair/"), alone, beside, ratio])
    head = ["digits_cnn at 50/s, 16 clients at each of the others", "p99 alone", "beside", "ratio"]
    return table(head, rows) if rows else ""


# --- targets -----------------------------------------------------------------------------------------


def targets(m):
    """(what, samples or None, bound, whether at least, how to show, and the same by CPU time where that may decide)."""
    for workload in LARGE_MODELS:
        for protocol in ("binary", "grpc"):
            for clients in (8, 32):
                what = f"{workload}, {SPOKEN[protocol]}, {clients} clients: of the ceiling"
                yield what, m.of_ceiling(workload, protocol, clients), 0.95, True, ratios.show
            what = f"{workload}, {SPOKEN[protocol]}, 1 client: latency over the best layout's"
            yield what, m.of_single(workload, protocol), 1.10, False, ratios.show
    for protocol, bound in (("binary", 0.7), ("grpc", 0.7), ("json", 0.6)):
        what = f"mlp, {SPOKEN[protocol]}, 64 clients: of the echo"
        yield what, m.ratio("echo", "mlp", protocol, 64), bound, True, ratios.show
    for protocol, bound in (("json", 0.08), ("binary", 0.08), ("grpc", 0.10)):
        cell = m.cell("echo", "mlp", protocol, 1)
        what = f"mlp, {SPOKEN[protocol]}, 1 client: p50 in ms"
        yield what, cell and cell["ours"]["p50"], bound, False, lambda samples: ratios.show(samples, 3)
    for protocol in ("binary", "grpc"):
        what = f"identity_1mib, {SPOKEN[protocol]}, 8 clients: of the echo"
        yield what, m.ratio("echo", "identity_1mib", protocol, 8), 0.8, True, ratios.show
    cell = m.cell("echo", "identity_1mib", "json", 8)
    what = "identity_1mib, REST, JSON, 8 clients: requests a second"
    yield what, cell and cell["ours"]["per_second"], 100, True, lambda samples: ratios.show(samples, 0)
    for kind, over, bound in (
        ("fixed", "of the best fixed setting", 0.95),
        ("unbatched", "of batching switched off", 0.97),
        ("unmonitored", "of monitoring switched off", 0.98),
    ):
        for workload in m.workloads(kind):
            cells = {clients: m.ratio(kind, workload, "binary", clients) for clients in m.clients(kind)}
            cells = {clients: samples for clients, samples in cells.items() if samples}
            if cells:
                worst = min(cells, key=lambda clients: statistics.median(cells[clients]))
                what = f"{workload}, {worst} client{'s' if worst > 1 else ''}, its worst: {over}"
                yield what, cells[worst], bound, True, ratios.show, m.by_cpu(kind, workload, worst)
    fair = m.measured.get("fair/quiet beside two greedy")
    what = "digits_cnn at 50/s beside encoder_32 and mobilenet, 16 clients each: p99 over alone"
    yield what, fair and ratios.paired(fair["beside"], fair["alone"]), 1.5, False, ratios.show
    start = m.measured.get("start/examples")
    milliseconds = start and [1000 * seconds for seconds in start["second"]]
    yield "example registry, second start: ms until ready", milliseconds, 300, False, lambda s: ratios.show(s, 0)
    empty = m.measured.get("start/empty")
    resident = empty and [held["rss"] / MIB for held in empty["memory"]]
    yield "a server without models: MiB resident", resident, 60, False, lambda samples: ratios.show(samples, 0)


def judged(samples, bound, at_least, cpu=None):
    """Where the interval holds the bound, CPU time decides, if it is known."""
    verdict = ratios.verdict(samples, bound, at_least)
    if not (verdict.endswith("?") and cpu):
        return verdict
    return f"{verdict} By CPU time {ratios.show(cpu)}: {ratios.verdict(cpu, bound, at_least)}"


def verdicts(m):
    rows = [
        [what, show(samples), f"{'≥' if at_least else '≤'} {bound:g}", judged(samples, bound, at_least, *cpu)]
        for what, samples, bound, at_least, show, *cpu in targets(m)
        if samples
    ]
    return table(["what", "median (95 % interval)", "target", ""], rows) if rows else ""


# --- the page ----------------------------------------------------------------------------------------


def matrix(about, measured):
    m = Measured(measured)

    def of_echo(workload, protocol, clients):
        cell = m.cell("echo", workload, protocol, clients)
        if not cell:
            return MISSING
        ratio = m.ratio("echo", workload, protocol, clients)
        # Of what the engine takes all the time, the transport's share says nothing.
        told = f", {ratios.show(ratio)}" if ratio and statistics.median(ratio) >= LEAST_TOLD else ""
        return rate(cell["ours"]["per_second"]) + told

    def m_show(kind, workload, protocol, clients):
        return shown(m.ratio(kind, workload, protocol, clients))

    def latency(workload, protocol, clients):
        cell = m.cell("echo", workload, protocol, clients)
        if not cell:
            return MISSING
        p50, p99 = (statistics.median(cell["ours"][which]) for which in ("p50", "p99"))
        return f"{p50:.3g} / {p99:.3g} ms"

    def against(kind):
        return by_clients(m, kind, ("binary",), lambda *cell: m_show(kind, *cell))

    parts = [
        ("", where(about) + "\n"),
        ("Targets", verdicts(m)),
        ("Of the ceiling", by_clients(m, "echo", PROTOCOLS, lambda *cell: shown(m.of_ceiling(*cell)))),
        ("Of the bare transport", by_clients(m, "echo", PROTOCOLS, of_echo)),
        ("Latency: p50 / p99", by_clients(m, "echo", PROTOCOLS, latency)),
        ("The engine alone", ceilings(m)),
        ("Batching, over none, REST, binary", against("unbatched")),
        ("Chosen by itself, over the best fixed setting, REST, binary", against("fixed")),
        ("Monitoring, over none, REST, binary", against("unmonitored")),
        ("Start and memory", starting(m, about)),
        ("In company", company(m)),
    ]
    return "\n".join((f"### {title}\n\n" if title else "") + text for title, text in parts if text)


def put(part, text, page=PAGE):
    """Replaces what stands between the part's marks; the rest of the page is written by hand."""
    begin, end = f"<!-- {part}: written by make -->\n", f"<!-- end of {part} -->"
    old = page.read_text()
    before, rest = old.split(begin)
    page.write_text(before + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])


def line(key, value):
    """One measurement, for the person who waits."""
    if "ours" in value:
        ours, theirs = value["ours"]["per_second"], value["theirs"]["per_second"]
        pairs = ratios.paired(ours, theirs)
        told = f"ratio {ratios.show(pairs)}" if pairs else "no ratio: theirs gave no answer"
        return f"{key}: {rate(ours)} and {rate(theirs)}, {told}"
    return key
