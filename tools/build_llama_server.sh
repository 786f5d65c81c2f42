#!/usr/bin/env bash
# Builds the peer that `bench.serving` measures against: llama-server and llama.cpp's own benchmarks, from the source
# distribution of llama-cpp-python that constraints.txt pins, with the options its wheel is built with (CPU, Release,
# shared libraries, for this machine's processor). So both sides run the same engine, compiled the same way.
#
#   tools/build_llama_server.sh [DIRECTORY]
#
# DIRECTORY is where all goes; the default is $LM_BENCH_CACHE/llama.cpp-VERSION, else lm-bench/llama.cpp-VERSION in
# $XDG_CACHE_HOME or ~/.cache. The programs are in DIRECTORY/bin. What is there already is kept; JOBS and PYTHON as in
# make. Takes about 10 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
programs=(llama-server llama-bench llama-batched-bench llama-quantize)

version=$(sed -nE 's/^llama[-_]cpp[-_]python==(.+)$/\1/p' constraints.txt)
if [[ -z $version ]]; then
  echo "error: constraints.txt pins no llama-cpp-python" >&2
  exit 1
fi
cache=${LM_BENCH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lm-bench}
directory=$(realpath -m "${1:-$cache/llama.cpp-$version}")

# The marker is written last, so that a build that was cut short goes on where it was.
marker=$directory/built
if [[ -e $marker && $(<"$marker") == "$version ${programs[*]}" ]]; then
  echo "llama.cpp of llama-cpp-python $version is already in $directory/bin"
  exit 0
fi

tools/preflight.sh "$python"
mkdir -p "$directory"
cd "$directory"

if [[ ! -e source/CMakeLists.txt ]]; then
  echo "downloading the source of llama-cpp-python $version from where pip is configured to look"
  # Constraints of the installed environment say nothing about what is built here.
  "$python" -m pip download -q --no-deps --no-binary llama-cpp-python -d download "llama-cpp-python==$version"
  rm -rf unpacked
  mkdir unpacked
  tar -xzf download/llama_cpp_python-"$version".tar.gz -C unpacked --strip-components=1
  mv unpacked/vendor/llama.cpp source
  rm -rf unpacked download
fi

echo "building ${programs[*]} in $directory with $jobs jobs"
generator=()
if command -v ninja >/dev/null 2>&1; then generator=(-G Ninja); fi
# As the wheel's own CMakeLists.txt: shared libraries, the common library, no curl. Beside that: no TLS and no web page,
# which would be fetched from the network.
cmake -S source -B build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
  -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON \
  -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF >configure.log 2>&1 || {
  tail -n 20 configure.log >&2
  echo "error: cmake cannot configure llama.cpp; all of it is in $directory/configure.log" >&2
  exit 1
}
cmake --build build --parallel "$jobs" --target "${programs[@]}" >build.log 2>&1 || {
  tail -n 20 build.log >&2
  echo "error: llama.cpp does not build; all of it is in $directory/build.log" >&2
  exit 1
}

ln -sfn build/bin bin
for program in "${programs[@]}"; do
  test -x "bin/$program"
done
bin/llama-server --version
echo "$version ${programs[*]}" >"$marker"
echo "llama.cpp of llama-cpp-python $version is in $directory/bin"
