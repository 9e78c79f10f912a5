"""An independent client: it knows the server's address and nothing of the protos.

Everything comes from reflection: the services, the messages, their fields. It checks health, submits
the pipeline that it reads from standard input, watches the run to its end, and prints what it saw as
one JSON object.
"""

import json
import sys

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

WITHIN = 60  # seconds, for each call


def main(address: str, base_dir: str) -> None:
    pipeline = sys.stdin.read()
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=WITHIN)
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=WITHIN
        )
        database = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(database.get_services())
        pool = DescriptorPool(database)
        runs = pool.FindServiceByName("emberline.v1.RunService")

        def call(name: str, **fields):
            """Calls a method whose messages are built from the server's own description."""
            method = runs.methods_by_name[name]
            request_class = message_factory.GetMessageClass(method.input_type)
            response_class = message_factory.GetMessageClass(method.output_type)
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            send = kind(
                f"/{runs.full_name}/{name}",
                request_serializer=request_class.SerializeToString,
                response_deserializer=response_class.FromString,
            )
            return send(request_class(**fields), timeout=WITHIN)

        refused = None
        try:
            call("SubmitRun", pipeline_yaml="pipeline: p\nstages: { a: { kind: nope } }\n",
                 file_name="bad.yaml", base_dir=base_dir, request_id="python-bad")
        except grpc.RpcError as error:
            refused = {
                "code": error.code().name,
                "message": error.details(),
                "has_details": any(
                    key == "grpc-status-details-bin" for key, _ in error.trailing_metadata()
                ),
            }

        submitted = call("SubmitRun", pipeline_yaml=pipeline, file_name="python.yaml",
                         base_dir=base_dir, request_id="python-1")
        again = call("SubmitRun", pipeline_yaml=pipeline, file_name="python.yaml",
                     base_dir=base_dir, request_id="python-1")
        events = [json_format.MessageToDict(e) for e in call("WatchRun", run=submitted.run)]
        final = json_format.MessageToDict(call("GetRun", run=submitted.run))

    json.dump(
        {
            "health": health_pb2.HealthCheckResponse.ServingStatus.Name(health.status),
            "services": services,
            "methods": sorted(runs.methods_by_name),
            "refused": refused,
            "run": submitted.run,
            "same_run": again.run == submitted.run and again.already_existed,
            "events": events,
            "final": final,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
