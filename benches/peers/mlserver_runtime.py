"""An onnxruntime model for MLServer, which has no runtime of its own for ONNX; and how to start it.

mlserver_runtime.py REGISTRY HTTP_PORT GRPC_PORT writes MLServer's settings and becomes `mlserver start`: a worker
process for each core, without its adaptive batching, which is off by default.
"""

import json
import os
import pathlib
import shutil
import sys

import v2
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    async def load(self) -> bool:
        options = v2.onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = v2.session(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {given.name: NumpyCodec.decode_input(given) for given in payload.inputs}
        values = self.session.run(None, inputs)
        outputs = [NumpyCodec.encode_output(o.name, value) for o, value in zip(self.session.get_outputs(), values)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


def main(registry, http_port, grpc_port):
    folder = pathlib.Path(sys.prefix) / "settings"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = {"host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": 0}
    settings |= {"parallel_workers": v2.cores(), "metrics_endpoint": None, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, session in v2.sessions(registry).items():
        described = v2.metadata(name, session)
        (folder / name).mkdir()
        path = pathlib.Path(registry).resolve() / name / "1/model.onnx"
        model = {"name": name, "implementation": "mlserver_runtime.Onnx", "platform": described["platform"]}
        model |= {"versions": ["1"], "inputs": described["inputs"], "outputs": described["outputs"]}
        model["parameters"] = {"uri": str(path), "version": "1"}
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    here = str(pathlib.Path(__file__).parent)
    command = str(pathlib.Path(sys.executable).with_name("mlserver"))
    os.execve(command, [command, "start", str(folder)], os.environ | {"PYTHONPATH": here})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
