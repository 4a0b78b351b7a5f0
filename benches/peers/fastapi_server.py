"""FastAPI and onnxruntime, as written by hand: a process for each core, a session of one thread in each.

fastapi_server.py REGISTRY HTTP_PORT GRPC_PORT; there is no gRPC.
"""

import os
import sys

import orjson
import uvicorn
import v2
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

app = FastAPI()
sessions = v2.sessions(os.environ["REGISTRY"]) if "REGISTRY" in os.environ else {}


@app.get("/v2/models/{name}")
async def metadata(name: str):
    return v2.metadata(name, sessions[name])


def run(name, body):
    session = sessions[name]
    values = session.run(None, v2.arrays(orjson.loads(body)))
    return orjson.dumps(v2.answer(name, session, values))


@app.post("/v2/models/{name}/infer")
async def infer(name: str, request: Request):
    answer = await run_in_threadpool(run, name, await request.body())
    return Response(answer, media_type="application/json")


if __name__ == "__main__":
    os.environ["REGISTRY"] = sys.argv[1]
    uvicorn.run(
        "fastapi_server:app", host="127.0.0.1", port=int(sys.argv[2]), workers=v2.cores(), log_level="warning"
    )
