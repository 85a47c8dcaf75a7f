#!/bin/sh
# Run clang-tidy (.clang-tidy) over the core: kernels at one ISA level, since all levels share their source.
# usage: tools/tidy.sh [sources]      all of cpp/ and the sources made for each format unless given; some minutes of one core
set -eu
cd "$(dirname "$0")/.."
venv=$PWD/${VENV:-.venv}
PATH=$venv/bin:$PATH
case $(uname -m) in x86_64) level=v3 ;; aarch64 | arm64) level=neon ;; *) level=scalar ;; esac
cmake -G Ninja -S . -B build/tidy -DCMAKE_BUILD_TYPE=Release -DRAMGGUF_ISAS=$level \
    -DPython_EXECUTABLE="$venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
# A file is checked again when it, a header or the checks changed.
newest=$(find .clang-tidy cpp -type f ! -name '*.cpp' -exec ls -t {} + | head -n 1)
[ $# -gt 0 ] || set -- $(find cpp -name '*.cpp') build/tidy/formats/*.cpp
for source in "$@"; do
    passed=build/tidy/passed/$source  # by path: names repeat between folders
    mkdir -p "${passed%/*}"
    [ "$passed" -nt "$source" ] && [ "$passed" -nt "$newest" ] || echo "$source"
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I FILE sh -c \
    'clang-tidy --quiet -p build/tidy FILE && touch build/tidy/passed/FILE'
