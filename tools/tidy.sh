#!/bin/sh
# Run clang-tidy (.clang-tidy) over the core: kernels at one ISA level, since all levels share their source.
# usage: tools/tidy.sh [sources]      all of cpp/ unless given; two to three minutes of one core
set -eu
cd "$(dirname "$0")/.."
venv=$PWD/${VENV:-.venv}
PATH=$venv/bin:$PATH
case $(uname -m) in x86_64) level=v3 ;; aarch64 | arm64) level=neon ;; *) level=scalar ;; esac
cmake -G Ninja -S . -B build/tidy -DCMAKE_BUILD_TYPE=Release -DRAMGGUF_ISAS=$level \
    -DPython_EXECUTABLE="$venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
# A file is checked again when it, a header or the checks changed.
newest=$(ls -t .clang-tidy cpp/*.h cpp/*.def cpp/*/*.h | head -n 1)
[ $# -gt 0 ] || set -- cpp/*.cpp
for source in "$@"; do
    passed=build/tidy/$(basename "$source").passed
    [ "$passed" -nt "$source" ] && [ "$passed" -nt "$newest" ] || echo "$source"
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I FILE sh -c \
    'clang-tidy --quiet -p build/tidy FILE && touch build/tidy/$(basename FILE).passed'
