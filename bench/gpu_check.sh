#!/usr/bin/env bash
# Checks residency on a machine with a GPU: builds the engine for it where it is not built yet, makes random models in the
# shape of Llama 3 8B, and runs loads, swaps, evictions and failures against what the driver shows. See docs/guides/gpu.md.
#
#   bench/gpu_check.sh [--device cuda0] [--num-ctx 8192]
#
# BACKEND is what the engine is built with: cuda (the default), hip, vulkan, sycl. VENV is the environment that is used,
# .venv-gpu unless it is set. Takes 20 GB of disk in TMPDIR. Ends with 1 when a check failed.
set -euo pipefail
cd "$(dirname "$0")/.."
backend=${BACKEND:-cuda}
venv=${VENV:-.venv-gpu}
python=${PYTHON:-python3}

case $backend in
  cuda) needed=nvcc build="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native" library=cuda ;;
  hip) needed=hipcc build="-DGGML_HIP=on" library=hip ;;
  vulkan) needed=glslc build="-DGGML_VULKAN=on" library=vulkan ;;
  sycl) needed=icpx build="-DGGML_SYCL=on -DCMAKE_C_COMPILER=icx -DCMAKE_CXX_COMPILER=icpx" library=sycl ;;
  *)
    echo "error: BACKEND=$backend is none of cuda, hip, vulkan, sycl" >&2
    exit 2
    ;;
esac

built() {
  # Finds the package without importing it: that would load its libraries.
  "$venv/bin/python" - "$library" <<'PY' 2>/dev/null
import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("llama_cpp")
places = spec.submodule_search_locations if spec else []
sys.exit(not any(any(Path(place, "lib").glob(f"*ggml-{sys.argv[1]}*")) for place in places))
PY
}

if ! built; then
  if ! command -v "$needed" >/dev/null 2>&1; then
    echo "error: cannot build the engine for $backend: $needed is not found" >&2
    echo >&2
    echo "hint: install the toolkit (docs/guides/gpu.md), or put its bin directory into PATH" >&2
    exit 1
  fi
  tools/preflight.sh "$python"
  echo "building the engine for $backend into $venv"
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  CMAKE_ARGS=$build CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} \
    "$venv/bin/python" -m pip install -q --no-cache-dir --no-binary llama-cpp-python -c constraints.txt -e . --group test
  if ! built; then
    echo "error: the engine was built without $backend" >&2
    exit 1
  fi
fi

if [[ $backend == cuda ]] && ! nvidia-smi -L; then
  echo "error: nvidia-smi finds no card" >&2
  exit 1
fi
exec "$venv/bin/python" -m bench.gpu_check "$@"
