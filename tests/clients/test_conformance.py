"""The ONNX project's node tests: what passes in process passes through the server, the same over both protocols."""

from conformance import ask_all, engine_of, failures_in_process, problems, registry
from node_tests import cases
from support import Server


def test_the_node_tests_pass_over_rest_and_grpc():
    found = cases()
    carried = [case for case in found if not case.not_carried]
    server = Server(registry(found))
    try:
        engine = engine_of(server, carried)
        outcomes = ask_all(server, carried)
    finally:
        server.stop()
    failures = failures_in_process(carried) if engine == "onnxruntime" else {}
    assert problems(engine, outcomes, failures) == []
