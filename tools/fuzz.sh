#!/bin/sh
# Fuzz the header scanner (libFuzzer, ASan, UBSan) and what stands on it in Python (atheris).
# usage: tools/fuzz.sh [seconds for each target]      needs clang with libFuzzer; CLANGXX names it
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-600}
work=${FUZZ_DIR:-build/fuzz}
python=${VENV:-.venv}/bin/python
clangxx=${CLANGXX:-}
for name in clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14; do
    [ -n "$clangxx" ] || clangxx=$(command -v $name || true)
done
[ -n "$clangxx" ] || { echo "no clang++: apt install clang-14 libclang-rt-14-dev libfuzzer-14-dev" >&2; exit 1; }

targets="gguf documents edits results journals imatrix hessian headers-used hessian-encode imatrix-encode results-compared"
mkdir -p "$work/header" "$work/findings"
"$python" tests/fuzz/make_seeds.py "$work/seeds"
"$clangxx" -std=c++17 -g -O1 -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
    -Icpp tests/fuzz/header_fuzzer.cpp cpp/gguf/header.cpp -o "$work/header_fuzzer"
# Time on a busy machine is not the unit's own: the slowest one is printed, and only 5 s are a finding.
limits="-timeout=5 -max_total_time=$seconds -print_final_stats=1 -artifact_prefix=$work/findings/"
"$work/header_fuzzer" $limits -malloc_limit_mb=64 -dict=tests/fuzz/gguf.dict "$work/header" "$work/seeds/gguf" \
    2>"$work/header.log" || { tail -n 40 "$work/header.log"; exit 1; }
tail -n 7 "$work/header.log"

"$python" -m pip install --disable-pip-version-check -q 'atheris>=3'
for target in $targets; do
    mkdir -p "$work/$target"
    "$python" tests/fuzz/python_fuzzer.py "$target" $limits -dict=tests/fuzz/gguf.dict "$work/$target" "$work/seeds/$target" \
        2>"$work/$target.log" || { tail -n 40 "$work/$target.log"; exit 1; }
    tail -n 7 "$work/$target.log"
done
