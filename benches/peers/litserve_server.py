"""LitServe with onnxruntime: for each model as many workers as cores, batches of up to 8 as they are waiting.

litserve_server.py REGISTRY HTTP_PORT GRPC_PORT; there is no gRPC.
"""

import pathlib
import sys

import litserve
import numpy as np
import v2


class Model(litserve.LitAPI):
    def __init__(self, registry, name):
        super().__init__(api_path=f"/v2/models/{name}/infer", max_batch_size=8, batch_timeout=0.001)
        self.registry, self.name = registry, name

    def setup(self, device):
        self.session = v2.sessions(self.registry)[self.name]

    def decode_request(self, request):
        return v2.arrays(request)

    def batch(self, requests):
        return {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}

    def predict(self, inputs):
        return self.session.run(None, inputs)

    def unbatch(self, outputs):
        return [[value[row : row + 1] for value in outputs] for row in range(len(outputs[0]))]

    def encode_response(self, values):
        return v2.answer(self.name, self.session, values)


def main(registry, port):
    described = {name: v2.metadata(name, session) for name, session in v2.sessions(registry).items()}
    server = litserve.LitServer(
        [Model(registry, name) for name in described],
        accelerator="cpu",
        workers_per_device=v2.cores(),
        fast_queue=False,
    )
    server.app.get("/v2/models/{name}")(lambda name: described[name])
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
