#!/bin/sh
# Build the source distribution, unpack it where there is no git, install it into a new environment with the
# lowest versions that pyproject.toml allows (tools/oldest.txt), and run tests against what was installed.
# usage: tools/oldest.sh [constraints]      tools/oldest.txt unless given; /dev/null takes the newest versions
set -eu
cd "$(dirname "$0")/.."
constraints=$(realpath "${1:-tools/oldest.txt}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${VENV:-.venv}/bin/python" -m build --sdist --no-isolation -o "$work" . >/dev/null
mkdir "$work/source"
tar -xzf "$work"/ramgguf-*.tar.gz -C "$work/source" --strip-components 1

"${PYTHON:-python3}" -m venv "$work/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$constraints"
"$work/venv/bin/python" -m pip install -q "$work/source" pytest hypothesis
# The engine, if its wheel was built before (tools/install.sh); tests that need it are skipped without.
wheel=$(ls "${RAMGGUF_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/ramgguf}"/wheels/llama-cpp-python-0.3.36-*/*.whl 2>/dev/null | head -n 1)
if [ -n "$wheel" ]; then "$work/venv/bin/python" -m pip install -q "$wheel"; fi
"$work/venv/bin/python" -m pip list 2>/dev/null | grep -i -E '^(gguf|numpy|pydantic|rich|scipy|typer|llama)' || true

# Away from the sources: what is imported is what was installed.
cp -r tests bench tools pyproject.toml "$work/"
cd "$work"
"$work/venv/bin/ramgguf" --version
files="tests/test_units.py tests/test_formats.py tests/test_gguf_io.py tests/test_gguf_write.py tests/test_imatrix.py
    tests/test_allocate.py tests/test_quantize.py tests/test_hostile_documents.py tests/test_result_files.py
    tests/test_robust.py tests/test_cli.py tests/test_engine.py tests/test_sensitivity.py"
"$work/venv/bin/python" -P -m pytest -q -p no:cacheprovider -k 'not in_50_ms' $files
