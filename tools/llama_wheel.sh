#!/bin/sh
# Print the path of a wheel of llama-cpp-python for this CPU.
# It is built from source (minutes), once per version and CPU, and stays in the user's cache.
set -eu
: "${VENV:=.venv}" "${LLAMA_CPP_PYTHON:=0.3.36}"
cd "$(dirname "$0")/.."

# ggml compiles for the CPU it is built on, so a wheel is only good for CPUs with the same features.
cpu=$({ uname -m; "$VENV/bin/python" -V; grep -m1 -E '^(flags|Features)' /proc/cpuinfo || true; } | cksum | cut -d' ' -f1)
# Without AMX: compiled by GCC 12, llama.cpp's AMX kernels crash (docs/evaluation.md, "Crashes").
case $(uname -m) in
    x86_64) no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" ;;
    *) no_amx="" ;;
esac
wheels="${RAMGGUF_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/ramgguf}/wheels/llama-cpp-python-$LLAMA_CPP_PYTHON-$cpu${no_amx:+-no-amx}"
if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    echo "building llama-cpp-python $LLAMA_CPP_PYTHON from source: about 4 minutes, this once" >&2
    mkdir -p "$wheels"
    build=$(mktemp -d "$wheels/build.XXXXXX")
    CFLAGS="${CFLAGS:-} $no_amx" CXXFLAGS="${CXXFLAGS:-} $no_amx" "$VENV/bin/python" -m pip \
        --disable-pip-version-check -q wheel --no-cache-dir --no-deps --no-binary llama-cpp-python \
        -w "$build" "llama-cpp-python==$LLAMA_CPP_PYTHON" >&2
    mv "$build"/*.whl "$wheels/"
    rmdir "$build"
fi
ls "$wheels"/llama_cpp_python-*.whl
