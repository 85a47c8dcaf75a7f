#!/bin/sh
# Build the wheel for Linux on aarch64 with a cross-compiler and try it in an emulator: in Debian's Python for arm64, with
# the packages of PyPI for aarch64, run the tests that cibuildwheel is told to run, and quantize to the bytes of this machine.
# usage: tools/aarch64.sh [arguments of pytest]      after `make all`; all is kept in build/aarch64, nothing is installed
# needs: g++-aarch64-linux-gnu and qemu-user, Debian's apt and dpkg (not root), and the network the first time
set -eu
cd "$(dirname "$0")/.."
host=$PWD/${VENV:-.venv}/bin
case ${VENV:-} in /*) host=$VENV/bin ;; esac
work=$PWD/build/aarch64
root=$work/root           # Debian's Python 3.11 and what it needs, unpacked
python=$work/venv/bin/python
packages=$work/venv/lib/python3.11/site-packages
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg; do
    command -v $tool >/dev/null || { echo "aarch64: needs $tool: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
done
mkdir -p "$work"

# An apt of its own: another architecture, nothing installed yet, and every file of it in one folder.
fetch_python() {
    apt=$work/apt
    rm -rf "$apt" "$root"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/apt.conf.d" "$apt/preferences.d" "$root"
    : >"$apt/status"
    echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main' \
        >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Dir "$apt";
Dir::Etc "$apt";
Dir::Etc::sourceparts "-";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
END
    (
        cd "$apt/archives"
        export APT_CONFIG="$apt/apt.conf"
        apt-get -qq update
        apt-get -qq --download-only install python3.11 libstdc++6
        apt-get -qq download libpython3.11-dev  # the headers, without those of libc
    )
    for deb in "$apt"/archives/*.deb; do dpkg -x "$deb" "$root"; done
    # Debian's pyconfig.h asks for that of the architecture in a folder that only its own compiler searches.
    cp "$root/usr/include/aarch64-linux-gnu/python3.11/pyconfig.h" "$root/usr/include/python3.11/"
    rm -rf "$apt"
    touch "$root/complete"
}

# A virtual environment whose Python is a script of this machine: what starts sys.executable starts the emulator.
make_environment() {
    rm -rf "$work/venv"
    mkdir -p "$work/venv/bin" "$packages"
    printf 'home = %s\ninclude-system-site-packages = false\n' "$root/usr/bin" >"$work/venv/pyvenv.cfg"
    printf '#!/bin/sh\nexec qemu-aarch64 -L "%s" -0 "%s" "%s" "$@"\n' "$root" "$python" "$root/usr/bin/python3.11" >"$python"
    chmod +x "$python"
    "$host/python" -m pip install -q --disable-pip-version-check --no-compile --target "$packages" --python-version 3.11 \
        --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \
        --only-binary=:all: pip build scikit-build-core pybind11 \
        $("$host/python" -c '
import tomllib
configured = tomllib.load(open("pyproject.toml", "rb"))
needed = configured["project"]["dependencies"] + configured["tool"]["cibuildwheel"]["test-requires"]
print(*(name.replace(" ", "") for name in needed))')
}

# The build runs in the emulated Python, which knows its headers and names; CMake and the compiler are this machine's.
build_wheel() {
    cat >"$work/toolchain.cmake" <<END
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
END
    rm -f "$work"/ramgguf-*.whl
    PATH=$host:$PATH CMAKE_ARGS="-DCMAKE_TOOLCHAIN_FILE=$work/toolchain.cmake -DRAMGGUF_WERROR=ON" \
        "$python" -m build --wheel --no-isolation --skip-dependency-check -o "$work" .
    "$python" -m pip install -q --disable-pip-version-check --force-reinstall --no-deps "$work"/ramgguf-*.whl
    "$python" -m pip check
}

# The wheel has no engine and no real model; and 5 s are allowed to a CPU, not to an emulator.
run_tests() {
    [ $# -gt 0 ] || set -- tests/quants/test_formats.py tests/cpp/test_kernels.py tests/cpp/test_logits.py $("$host/python" -c '
import re, tomllib
print(*re.findall(r"tests/\S+", tomllib.load(open("pyproject.toml", "rb"))["tool"]["cibuildwheel"]["test-command"]))')
    "$python" -m pytest -q -p no:cacheprovider -k 'not costs_little' "$@"
}

quantize() {
    "$1/ramgguf" quantize "$work/model.gguf" --budget 4.5bpw --encoder "$2" --force -o "$3" >"$work/log" 2>&1 ||
        { cat "$work/log" >&2; exit 1; }
}

compare_outputs() {
    "$host/python" -c '
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests")
from gguf_samples import write_model
write_model(Path(sys.argv[1]), rng=np.random.default_rng(1))' "$work/model.gguf"
    for encoder in rtn search; do
        quantize "$host" $encoder "$work/here.gguf"
        quantize "$work/venv/bin" $encoder "$work/there.gguf"
        cmp "$work/here.gguf" "$work/there.gguf"
    done
    echo 'quantized to the same bytes as on this machine'
}

[ -e "$root/complete" ] || fetch_python
[ -d "$packages/pip" ] || make_environment
export PYTHONSAFEPATH=1  # what is imported is the wheel, not ./ramgguf
# NumPy's OpenBLAS has kernels for SVE, which the emulator has; they raise flags on what is no error (right products
# of 64 × 64 random float32), so NumPy warns, and the tests take warnings for errors. Its kernels for any ARMv8 do not.
export OPENBLAS_CORETYPE=ARMV8
"$python" -c 'import platform; print("Python", platform.python_version(), "on", platform.machine())'
build_wheel
ls -l "$work"/ramgguf-*.whl
aarch64-linux-gnu-objdump -T "$packages"/ramgguf/_core.*.so | grep -o -E 'GLIBC(XX)?_[0-9.]+' | sort -V -u | tr '\n' ' '
compare_outputs
run_tests "$@"
