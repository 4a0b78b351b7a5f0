"""Servers under measurement: started on free ports, read from their log, stopped, and looked at while they run."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
BINARY = pathlib.Path(os.environ.get("TIDEGATE_BIN", REPOSITORY / "target/release/tidegate"))
START_SECONDS, STOP_SECONDS = 600, 30


def environment(cache, **more):
    """Nothing configured but `more`; what the server remembers between starts lies in `cache`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return kept | {"XDG_CACHE_HOME": str(cache)} | more


class Server:
    """`tidegate serve`, in a process group of its own, so that what ends the benchmark does not cut it off midway."""

    def __init__(self, registry, cache, *flags, **variables):
        command = [BINARY, "serve", "--registry", registry, "--host", "127.0.0.1", "--log-format", "json", *flags]
        for port in ("http", "grpc", "metrics", "admin"):
            command += [f"--{port}-port", "0"]
        self.lines, self.ready, self.told = [], None, threading.Event()
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment(cache, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        # To the end: a full pipe would block the server.
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        if not self.told.wait(START_SECONDS) or self.ready is None:
            self.stop()
            raise RuntimeError("the server did not become ready:\n" + "".join(self.lines[-50:]))
        self.url, self.grpc = f"http://{self.ready['http']}", f"grpc://{self.ready['grpc']}"
        self.pid = self.process.pid

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            fields = log_fields(line)
            if self.ready is None and fields.get("message") == "ready" and "http" in fields:
                self.ready, self.seconds_to_ready = fields, time.monotonic() - self.begun
                self.told.set()
        self.told.set()

    def memory(self):
        return memory(self.process.pid)

    def stop(self):
        stop(self.process)
        self.reader.join(STOP_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def stop(process, group=False):
    """SIGTERM to the process alone, which may have work to finish; SIGKILL to its group after a while, or at once
    after it where others of the `group` may be left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
        late = False
    except subprocess.TimeoutExpired:
        late = True
    if late or group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_fields(line):
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event | event["fields"] if isinstance(event.get("fields"), dict) else event


def memory(pid):
    """Resident and proportional bytes, and those that no other process shares."""
    fields = {}
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024
    return {"rss": fields["Rss"], "pss": fields["Pss"], "private": fields["Private_Clean"] + fields["Private_Dirty"]}


@contextlib.contextmanager
def before_others(nice=-10):
    """This session's processes before those of others while this lasts, where the kernel lets us: the scheduler's
    groups are sessions, so that client and servers stay equals. Elsewhere nothing happens."""
    path = pathlib.Path("/proc/self/autogroup")
    try:
        before = path.read_text().rsplit(" ", 1)[1].strip()
        path.write_text(str(nice))
    except (OSError, IndexError):
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.write_text(before)


def set_priority(thread, real_time):
    """Whether the kernel lets us. 0 is the caller."""
    policy = os.SCHED_FIFO if real_time else os.SCHED_OTHER
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(real_time))
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


@contextlib.contextmanager
def never_waiting(pid, names):
    """While this lasts, a process's threads whose names begin so, and what we start, have a core whenever they want
    one, ours first."""
    tasks = pathlib.Path(f"/proc/{pid}/task")
    threads = [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().startswith(names)]
    try:
        for thread, real_time in (*((thread, 1) for thread in threads), (0, 2)):
            if not set_priority(thread, real_time):
                raise RuntimeError("there is no right to real-time priority")
        yield
    finally:
        for thread in (*threads, 0):
            set_priority(thread, 0)


def say(text):
    print(text, file=sys.stderr, flush=True)
