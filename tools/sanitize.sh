#!/bin/sh
# Build the extension with AddressSanitizer and UBSan and run the tests of formats and of GGUF files with it.
# usage: tools/sanitize.sh [arguments of pytest]      after `make all`; needs GCC's libasan and libubsan
set -eu
cd "$(dirname "$0")/.."
venv=$PWD/${VENV:-.venv}
work=$PWD/build/sanitize
case $(uname -m) in
    x86_64) level=v3 ;;  # one level: each takes minutes to compile
    aarch64 | arm64) level=neon ;;
    *) level=scalar ;;
esac
grep -qw avx2 /proc/cpuinfo 2>/dev/null || [ $level != v3 ] || level=v1
asan=$(${CXX:-c++} -print-file-name=libasan.so)
if [ ! -e "$asan" ]; then
    echo "sanitize: skipped, ${CXX:-c++} has no libasan.so (it takes GCC)" >&2
    exit 0
fi

PATH=$venv/bin:$PATH
cmake -G Ninja -S . -B "$work" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
    -DRAMGGUF_SANITIZE=address,undefined -DRAMGGUF_ISAS=$level -DRAMGGUF_WERROR=ON \
    -DPython_EXECUTABLE="$venv/bin/python" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build "$work"

# A package whose Python is this folder's and whose extension is the sanitized one, in an environment that has
# the packages of $VENV but not its finder of the installed extension (.pth files there are not processed).
rm -rf "$work/site" && mkdir -p "$work/site/ramgguf"
ln -s "$PWD"/ramgguf/* "$work/site/ramgguf/"
rm -f "$work"/site/ramgguf/_core.*.so
ln -s "$work"/_core.*.so "$work/site/ramgguf/"
python -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$work/site" "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >"$site/ramgguf.pth"

# Python's own allocator would hide overruns of small objects; what Python keeps to its end is no leak.
# Limits of address space cannot be tried: the shadow of memory takes terabytes.
export PYTHONSAFEPATH=1  # not ./ramgguf, which has no extension
export PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
# libstdc++ beside it: the sanitizer looks for __cxa_throw before anything that throws is loaded.
LD_PRELOAD="$asan $(${CXX:-c++} -print-file-name=libstdc++.so.6)"
export LD_PRELOAD
[ $# -gt 0 ] || set -- tests/quants/test_formats.py tests/gguf/test_gguf_hostile.py tests/gguf/test_reader.py tests/gguf/test_writer.py \
    tests/cpp/test_kernels.py tests/cpp/test_logits.py tests/cpp/test_search.py tests/quants/test_descent.py tests/quants/test_points.py
# Not what is timed, and not a real model again. A report goes to stderr, which is not captured.
exec "$work/venv/bin/python" -m pytest -p no:cacheprovider -q --capture=sys \
    -k 'not cost_no_memory and not costs_little and not in_50_ms and not real_model' "$@"
