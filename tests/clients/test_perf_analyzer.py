"""NVIDIA's load generator, unmodified: it finds its way from a model's configuration to the server's own statistics."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest
from support import REPOSITORY, fetched_wheel

FOLDER = REPOSITORY / "target/perf-analyzer"
WHEEL = pathlib.Path(__file__).with_name("perf_analyzer.txt")
COMPILE_SECONDS = 300
RUN_SECONDS = 120

# It is linked with these for CUDA shared memory, which is not used here: functions that must be there to start it.
UNUSED = {
    "libb64.so.0d": [
        "base64_decode_block",
        "base64_encode_block",
        "base64_encode_blockend",
        "base64_init_decodestate",
        "base64_init_encodestate",
    ],
    "libcudart.so.12": [
        "cudaFree",
        "cudaGetErrorName",
        "cudaGetErrorString",
        "cudaIpcGetMemHandle",
        "cudaMalloc",
        "cudaMemcpy",
        "cudaSetDevice",
    ],
}


def fetch():
    with fetched_wheel(WHEEL, FOLDER) as archive:
        [member] = [name for name in archive.namelist() if name.endswith("/bin/perf_analyzer")]
        binary = FOLDER / "perf_analyzer"
        # Complete once it is named.
        partial = binary.with_suffix(".partial")
        partial.write_bytes(archive.read(member))
        partial.chmod(0o755)
        partial.rename(binary)


def make_unused_libraries(compiler):
    for library, functions in UNUSED.items():
        source = FOLDER / f"{library}.c"
        body = "".join(f"void {function}(void) {{ abort(); }}\n" for function in functions)
        source.write_text("#include <stdlib.h>\n" + body)
        flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
        subprocess.run([compiler, *flags, "-o", FOLDER / library, source], check=True, timeout=COMPILE_SECONDS)


@pytest.fixture(scope="module")
def perf_analyzer():
    """Runs it with arguments; skips where it cannot be had or cannot start."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("perf_analyzer's wheel is for Linux on x86-64")
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler to stand in for the CUDA libraries that perf_analyzer is linked with")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "perf_analyzer").exists():
        fetch()
    make_unused_libraries(compiler)

    def run(*arguments):
        command = [str(FOLDER / "perf_analyzer"), *map(str, arguments)]
        env = os.environ | {"LD_LIBRARY_PATH": str(FOLDER)}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_SECONDS)

    started = run("--version")
    if started.returncode != 0:
        pytest.skip(f"perf_analyzer does not start here: {started.stderr.strip()[-300:]}")
    return run


def measure(perf_analyzer, server, protocol, model, *arguments):
    """One short measurement: what it printed, and the server's part of it by name."""
    url = server.http if protocol == "http" else server.grpc
    command = ["-m", model, "-i", protocol, "-u", url, "--measurement-mode", "count_windows"]
    # Whether it is stable is not the question: a few windows, whatever they differ by.
    command += ["--measurement-request-count", 50, "--stability-percentage", 999, "--max-trials", 10, *arguments]
    done = perf_analyzer(*command)
    assert done.returncode == 0 and "Server:" in done.stdout, done.stdout + done.stderr
    counts = re.findall(r"^ *(\w+ count|Successful request count): (\d+)$", done.stdout.split("Server:")[1], re.M)
    return done.stdout, {name: int(count) for name, count in counts}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_completes_and_reads_the_servers_statistics(perf_analyzer, models, protocol):
    before = models.get("/v2/models/digits/versions/2/stats").json()["model_stats"][0]
    printed, server = measure(perf_analyzer, models, protocol, "digits", "-b", 3, "--concurrency-range", "2:2")
    assert "Batch size: 3" in printed and "Request concurrency: 2" in printed
    assert re.search(r"queue \d+ usec \+ compute input \d+ usec \+ compute infer \d+ usec", printed), printed
    after = models.get("/v2/models/digits/versions/2/stats").json()["model_stats"][0]
    assert 0 < server["Successful request count"] <= after["inference_stats"]["success"]["count"]
    # Of the windows it settled on, taken while requests were under way.
    assert 0 < server["Execution count"] <= server["Inference count"], printed
    assert server["Inference count"] % 3 == 0, printed
    ran = after["inference_count"] - before["inference_count"]
    assert ran % 3 == 0 and server["Inference count"] <= ran
    assert after["inference_stats"]["fail"] == before["inference_stats"]["fail"]


def test_a_model_with_other_free_dimensions(perf_analyzer, traps):
    _, server = measure(perf_analyzer, traps, "http", "identity_int32", "--shape", "x:5")
    assert server["Inference count"] > 0
