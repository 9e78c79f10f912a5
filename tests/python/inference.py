"""An independent client of served models: the public `tritonclient`, over gRPC and over HTTP.

It knows the server's address and the names of columns, asks both protocols for the same things, and
prints what it saw as one JSON object: under `grpc` and `http` the same keys.
"""

import json
import sys

import grpc
import numpy as np
import tritonclient.grpc
import tritonclient.http
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tritonclient.utils import InferenceServerException

MODEL = "factory"


def columns(rows: int):
    """Raw columns of some machines, each as its name, datatype and values."""
    n = np.arange(rows)
    kinds = np.array([[b"L", b"M", b"H"][i % 3] for i in n], dtype=np.object_)
    return [
        ("kind", "BYTES", kinds),
        ("torque", "FP64", ((n * 37) % 101) / 10.0),
        ("speed", "INT64", (((n * 53) % 97) * 10).astype(np.int64)),
        ("old", "BOOL", n % 7 == 0),
    ]


def inputs_of(protocol, rows: int, change=lambda name, datatype, values: (datatype, values), **kw):
    inputs = []
    for name, datatype, values in columns(rows):
        changed = change(name, datatype, values)
        if changed is None:
            continue
        datatype, values = changed
        tensor = protocol.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, **kw)
        inputs.append(tensor)
    return inputs


def seen_by(protocol, client, typed: dict, code) -> dict:
    """What one protocol shows. `typed`: how tensors are sent as JSON or typed contents, where it can."""

    def error_of(**arguments):
        try:
            client.infer(arguments.pop("model", MODEL), **arguments)
        except InferenceServerException as error:
            return {"code": code(error), "message": error.message()}
        return None

    seen = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "version_ready": client.is_model_ready(MODEL, "1"),
    }
    inputs = inputs_of(protocol, 5)
    result = client.infer(MODEL, inputs, request_id="py-1")
    seen["raw"] = {
        "probabilities": result.as_numpy("probabilities").tolist(),
        "class": [c.decode() for c in result.as_numpy("class")],
    }
    outputs = [protocol.InferRequestedOutput("class", **typed.get("output", {}))]
    result = client.infer(
        MODEL, inputs_of(protocol, 5, **typed.get("input", {})), outputs=outputs, model_version="1"
    )
    one = result.as_numpy("class")
    # As JSON they are texts, as bytes they are bytes.
    seen["typed"] = [c.decode() if isinstance(c, bytes) else c for c in one.tolist()]
    seen["only_what_was_asked"] = result.as_numpy("probabilities") is None
    # A column as `[rows, 1]`, in smaller types.
    smaller = {"torque": ("FP32", np.float32), "speed": ("INT16", np.int16)}
    narrow = inputs_of(
        protocol,
        5,
        lambda name, datatype, values: (
            (smaller[name][0], values.astype(smaller[name][1]).reshape(-1, 1))
            if name in smaller
            else (datatype, values.reshape(-1, 1))
        ),
    )
    result = client.infer(MODEL, narrow)
    seen["narrow"] = result.as_numpy("probabilities").tolist()

    seen["errors"] = {
        "model": error_of(model="nobody", inputs=inputs),
        "version": error_of(inputs=inputs, model_version="9"),
        "missing": error_of(
            inputs=inputs_of(protocol, 2, lambda n, d, v: None if n == "torque" else (d, v))
        ),
        "mistyped": error_of(
            inputs=inputs_of(
                protocol, 2, lambda n, d, v: ("FP64", v.astype(np.float64)) if n == "speed" else (d, v)
            )
        ),
        "nan": error_of(
            inputs=inputs_of(protocol, 2, lambda n, d, v: (d, v * np.nan) if n == "torque" else (d, v))
        ),
        "rows": error_of(
            inputs=inputs_of(protocol, 2, lambda n, d, v: (d, v[:1]) if n == "old" else (d, v))
        ),
        "output": error_of(inputs=inputs, outputs=[protocol.InferRequestedOutput("nothing")]),
    }
    return seen


def main(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        services = sorted(ProtoReflectionDescriptorDatabase(channel).get_services())
    with tritonclient.grpc.InferenceServerClient(address) as client:
        by_grpc = seen_by(tritonclient.grpc, client, {}, lambda e: e.status())
        metadata = client.get_model_metadata(MODEL, as_json=True)
        by_grpc["inputs"] = [[i["name"], i["datatype"]] for i in metadata["inputs"]]
        by_grpc["server"] = client.get_server_metadata(as_json=True)["name"]
        by_grpc["index"] = [m["name"] for m in client.get_model_repository_index(as_json=True)["models"]]
        result = client.infer(MODEL, inputs_of(tritonclient.grpc, 1), request_id="py-2")
        answer = result.get_response(as_json=True)
        by_grpc["answer"] = [answer["id"], answer["model_version"]]
    with tritonclient.http.InferenceServerClient(address) as client:
        typed = {"input": {"binary_data": False}, "output": {"binary_data": False}}
        http = seen_by(tritonclient.http, client, typed, lambda e: e.status())
        metadata = client.get_model_metadata(MODEL)
        http["inputs"] = [[i["name"], i["datatype"]] for i in metadata["inputs"]]
        http["server"] = client.get_server_metadata()["name"]
        http["index"] = [m["name"] for m in client.get_model_repository_index()]
        result = client.infer(MODEL, inputs_of(tritonclient.http, 1), request_id="py-2")
        answer = result.get_response()
        http["answer"] = [answer["id"], answer["model_version"]]
    json.dump({"grpc": by_grpc, "http": http, "services": services}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
