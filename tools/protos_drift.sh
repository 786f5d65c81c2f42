#!/usr/bin/env bash
# Fails when the checked-in stubs are not what protos/ generates.
set -euo pipefail
venv=${1:-.venv}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r protos "$scratch/protos"
find "$scratch/protos" \( -name '*_pb2*.py' -o -name '*_pb2*.pyi' \) -delete
bin=$(cd "$venv/bin" && pwd)
cd "$scratch/protos"
PATH="$bin:$PATH"
mapfile -t all < <(find lmd -name '*.proto' | sort)
mapfile -t services < <(find lmd -name '*_service.proto' | sort)
python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. "${all[@]}"
python -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. "${services[@]}"
cd - >/dev/null
if ! diff -r -x __pycache__ protos "$scratch/protos"; then
  echo "error: the checked-in stubs differ from what the protos generate" >&2
  echo >&2
  echo "hint: run \`make protos\` and commit the result" >&2
  exit 1
fi
