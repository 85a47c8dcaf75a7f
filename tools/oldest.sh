#!/bin/sh
# Build the source distribution, unpack it where there is no git, build and install it by itself into a new
# environment with the lowest versions that pyproject.toml allows (tools/oldest.txt), and run tests there.
# usage: tools/oldest.sh [constraints]      tools/oldest.txt unless given; /dev/null takes the newest versions
#        PYTHON=python3.13 tools/oldest.sh /dev/null      another Python; $VENV only builds the distribution
#        CMAKE_EXECUTABLE=...     another CMake than the lowest
set -eu
cd "$(dirname "$0")/.."
constraints=$(realpath "${1:-tools/oldest.txt}")
engine=$(sh tools/llama_wheel.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${VENV:-.venv}/bin/python" -m build --sdist --no-isolation -o "$work" . >/dev/null
mkdir "$work/source"
tar -xzf "$work"/ramgguf-*.tar.gz -C "$work/source" --strip-components 1

# What is imported must be what is installed: tests run away from the sources, and -P keeps their folder out.
cp -r tests bench tools pyproject.toml "$work/"
cd "$work"
"${PYTHON:-python3}" -m venv venv
python="$work/venv/bin/python"
# pip 25.3 and later do not take constraints of builds from PIP_CONSTRAINT.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$constraints" PIP_BUILD_CONSTRAINT="$constraints"
if [ -z "${CMAKE_EXECUTABLE:-}" ]; then
    $python -m pip install -q cmake
    CMAKE_EXECUTABLE=$($python -c 'import cmake; print(cmake.CMAKE_BIN_DIR)')/cmake
fi
export CMAKE_EXECUTABLE
$python -m pip install -q ./source "$engine" pytest hypothesis
$python -V
$python -m pip list 2>/dev/null | grep -i -E '^(cmake|gguf|llama|numpy|pydantic |rich|scipy|typer)'
venv/bin/ramgguf --version

# Not what is timed: other versions have other speeds.
$python -P -m pytest -q -p no:cacheprovider -k 'not in_50_ms and not take_seconds' \
    tests/core tests/gguf/test_reader.py tests/gguf/test_writer.py tests/gguf/test_gguf_hostile.py tests/quants \
    tests/cpp/test_logits.py tests/plan tests/quantize/test_quantize.py tests/evaluate/test_result_files.py \
    tests/evaluate/test_statistics.py tests/evaluate/test_evaluate.py tests/deploy/test_memory.py tests/cli/test_cli.py \
    tests/llama/test_engine.py tests/sensitivity/test_sensitivity.py
