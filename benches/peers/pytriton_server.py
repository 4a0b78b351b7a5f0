"""PyTriton, Triton with Python functions as models: for each model as many as cores, dynamic batching up to 32.

pytriton_server.py REGISTRY HTTP_PORT GRPC_PORT
"""

import sys

import v2
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def function(session):
    names = [output.name for output in session.get_outputs()]

    @batch
    def infer(**inputs):
        return dict(zip(names, session.run(names, inputs)))

    return infer


def tensors(described):
    """PyTriton puts the batch's axis in front by itself."""
    return [Tensor(name=t["name"], dtype=v2.TYPES[t["datatype"]], shape=tuple(t["shape"][1:])) for t in described]


def main(registry, http_port, grpc_port):
    config = TritonConfig(http_address="127.0.0.1", http_port=http_port, grpc_port=grpc_port, allow_metrics=False)
    with Triton(config=config) as triton:
        for name, session in v2.sessions(registry).items():
            described = v2.metadata(name, session)
            triton.bind(
                model_name=name,
                infer_func=[function(session) for _ in range(v2.cores())],
                inputs=tensors(described["inputs"]),
                outputs=tensors(described["outputs"]),
                config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
                strict=False,
            )
        triton.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
