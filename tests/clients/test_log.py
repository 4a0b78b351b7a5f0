"""The log as machines read it, and as nobody does."""

import json
import os
import socket
import subprocess

import numpy as np
import pytest
import requests
from support import BINARY, CALL_SECONDS, START_SECONDS, STOP_SECONDS, TRAPS, environment, eventually, json_input

BAD_ID = {"inputs": [json_input("ids", np.array([[10]], np.int64))]}


def test_every_line_is_a_json_object(traps):
    """Whatever an engine does on an index out of range, too: tract panics."""
    assert traps.post("/v2/models/gather/infer", BAD_ID).status_code == 400
    assert traps.lines
    for line in traps.lines:
        event = json.loads(line)
        assert {"timestamp", "level", "message"} <= set(event), line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_server_needs_no_reader_of_its_log(binary, log_format):
    """Every write to its standard error fails, as it does once a log collector has died."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        http = free.getsockname()[1]
    command = [BINARY, "serve", "--registry", TRAPS, "--host", "127.0.0.1", "--log-format", log_format]
    command += [f"--http-port={http}", "--grpc-port=0", "--metrics-port=0", "--admin-port=0"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, env=environment(), stdout=writer, stderr=writer) as process:
        os.close(writer)
        url = f"http://127.0.0.1:{http}/v2"
        try:
            eventually(lambda: ready(process, url), START_SECONDS)
            assert requests.post(f"{url}/models/gather/infer", json=BAD_ID, timeout=CALL_SECONDS).status_code == 400
            assert requests.get(f"{url}/health/ready", timeout=CALL_SECONDS).status_code == 200
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0
        finally:
            process.kill()


def ready(process, url):
    if process.poll() is not None:
        pytest.fail(f"it stopped with {process.returncode}")
    try:
        answer = requests.get(f"{url}/health/ready", timeout=CALL_SECONDS)
    except requests.ConnectionError as error:
        raise AssertionError("it does not listen yet") from error
    assert answer.status_code == 200
