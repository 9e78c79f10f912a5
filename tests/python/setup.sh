#!/bin/sh
# Makes the Python environment of the independent clients (of the coordinator over gRPC, of served
# models by tritonclient, of bundles) and of the example with scikit-learn, once, and prints its
# interpreter.
# It lives outside the repository, so that a fresh clone and CI share it.
set -eu
tools=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools}
environment=$tools/python
if ! "$environment/bin/python" -c 'import grpc, grpc_reflection, grpc_health, google.rpc, sklearn, safetensors, numpy, tritonclient.grpc, tritonclient.http' 2>/dev/null; then
    mkdir -p "$tools"
    # Built beside its place and then renamed, so that two that start at once do no harm.
    fresh=$(mktemp -d "$tools/python.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    python3 -m venv "$fresh" >&2
    # Today's tritonclient does not go with protobuf 7, and without this pip takes one of 2023.
    "$fresh/bin/python" -m pip install --quiet --disable-pip-version-check \
        grpcio grpcio-reflection grpcio-health-checking googleapis-common-protos \
        'tritonclient[grpc,http]' 'protobuf<7' safetensors numpy \
        -r "$(dirname "$0")/../../examples/sklearn-exec/requirements.txt" >&2
    rm -rf "$environment"
    # `python -m` and plain imports do not need the paths that a venv's scripts have in them.
    mv -T "$fresh" "$environment" 2>/dev/null || true
fi
echo "$environment/bin/python"
