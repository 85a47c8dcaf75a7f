#!/bin/sh
# Make $VENV with ramgguf, its extras and the developers' tools.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}"
cd "$(dirname "$0")/.."

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip="$VENV/bin/python -m pip --disable-pip-version-check -q"
$pip install -U 'pip>=24'
$pip install "$(VENV=$VENV sh tools/llama_wheel.sh)"
$pip install 'scikit-build-core>=0.11' 'pybind11>=2.13' cmake ninja
$pip install --no-build-isolation -Ccmake.define.RAMGGUF_WERROR=ON -e '.[eval,report,server,hub,cluster,dev]'
