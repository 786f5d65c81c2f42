#!/usr/bin/env bash
# Checks, before anything is installed, for what pip cannot install: llama-cpp-python is compiled on this machine.
set -euo pipefail
python=${1:-python3}

missing=()
for tool in cc c++ cmake make; do
  command -v "$tool" >/dev/null 2>&1 || missing+=("$tool")
done
if ((${#missing[@]})); then
  echo "error: cannot build the engine: not found: ${missing[*]}" >&2
  echo >&2
  echo "hint: on Debian or Ubuntu: apt-get install build-essential cmake python3-venv" >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: \`$python\` is not Python 3.11 or newer" >&2
  echo >&2
  echo "hint: name one: make PYTHON=python3.12 …" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "error: \`$python\` cannot make virtual environments" >&2
  echo >&2
  echo "hint: on Debian or Ubuntu: apt-get install python3-venv" >&2
  exit 1
fi
