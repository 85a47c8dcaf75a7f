"""Atheris target: whatever a file holds, opening it succeeds or raises an error of ours.

usage: python_fuzzer.py gguf|documents|results|imatrix [options of libFuzzer] [folder of seeds]
"""

import contextlib
import inspect
import os
import sys
from pathlib import Path

import atheris

from ramgguf import (
    gguf_io,
    gguf_shard,
    gguf_values,
    imatrix,
    journal,
    result_files,
    results,
    schema,
)
from ramgguf.errors import GGUFError, PlanError, RamggufError
from ramgguf.gguf_io import open_gguf, require_language_model
from ramgguf.imatrix import load_imatrix
from ramgguf.result_files import read_material
from ramgguf.schema import Measurement, Plan
from ramgguf.sensitivities import Sensitivity

_MODULES = (gguf_io, gguf_shard, gguf_values, imatrix, journal, result_files, results, schema)
_FOLDER = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
_PATH = _FOLDER / f"fuzz-{os.getpid()}.gguf"


def open_and_use(data: bytes) -> None:
    """Open the bytes as a GGUF file and touch all that it offers."""
    _PATH.write_bytes(data)
    try:
        with open_gguf(_PATH) as file:
            for key in file.metadata:
                _ = file.metadata[key]
            for tensor in file.tensors:
                file.read_rows(tensor, 0, tensor.n_rows)
            _ = file.header_sha256
            require_language_model(file)
            _ = file.n_layers, file.name, file.n_weights
    except GGUFError as e:
        message = str(e)
        if not (message.startswith(f"{_PATH}: ") and message.isprintable()):
            raise RuntimeError(f"an odd message: {message!r}") from e


def load_documents(data: bytes) -> None:
    """Read the bytes as the files that pass between stages."""
    text = data.decode("utf-8", errors="replace")
    for document in (Plan, Measurement, Sensitivity):
        with contextlib.suppress(PlanError):
            document.from_json(text)


def load_results(data: bytes) -> None:
    """Read the bytes as results: JSON, JSON lines and CSV, by their first byte."""
    suffix = {b"{": ".json", b"m": ".csv"}.get(data[:1], ".jsonl")
    path = _PATH.with_suffix(suffix)
    path.write_bytes(data.lstrip(b"\n"))
    try:
        for result in read_material([path]).results:
            _ = result.kld_mean, [(s.ppl, s.nll_per_token()) for s in result.sequences]
    except RamggufError as e:
        if "\n" in str(e):
            raise RuntimeError(f"an odd message: {e!r}") from e
    finally:
        path.unlink()


def load_importance(data: bytes) -> None:
    """Read the bytes as an importance matrix, GGUF or .dat by their magic."""
    _PATH.write_bytes(data)
    with contextlib.suppress(RamggufError):
        for entry in load_imatrix(_PATH).entries.values():
            if not (entry.values >= 0).all():
                raise RuntimeError(f"{entry.name!r} holds what is no mean square")


def instrument() -> None:
    """Have atheris follow our functions; it cannot see the import of an editable install."""
    for module in _MODULES:
        for thing in vars(module).values():
            inner = vars(thing).values() if inspect.isclass(thing) else (thing,)
            for member in inner:
                function = getattr(member, "__func__", member)  # what a class method wraps
                if inspect.isfunction(function) and function.__module__.startswith("ramgguf"):
                    atheris.instrument_func(function)


if __name__ == "__main__":
    targets = {
        "gguf": open_and_use,
        "documents": load_documents,
        "results": load_results,
        "imatrix": load_importance,
    }
    target = targets[sys.argv.pop(1)]
    instrument()
    try:
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
    finally:
        _PATH.unlink(missing_ok=True)
