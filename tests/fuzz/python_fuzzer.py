"""Atheris target: whatever a file holds, opening it succeeds or raises an error of ours.

usage: python_fuzzer.py gguf|documents|edits|results|journals|imatrix|hessian
       [options of libFuzzer] [folder of seeds]
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

import made_documents
from ramgguf.core import line_file, line_journal
from ramgguf.core.errors import GGUFError, RamggufError
from ramgguf.deploy import result as check_result
from ramgguf.evaluate import journal, result_files
from ramgguf.evaluate import result as results
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.gguf import header as gguf_values
from ramgguf.gguf import reader as gguf_io
from ramgguf.gguf import shards as gguf_shard
from ramgguf.gguf.reader import open_gguf, require_language_model
from ramgguf.measure.result import Measurement
from ramgguf.plan import frontier_result as curves
from ramgguf.plan import recipes
from ramgguf.plan import result as schema
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import Plan
from ramgguf.quants import hessian, imatrix
from ramgguf.quants.hessian import load_hessians
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.refine.journal import RefineJournal
from ramgguf.report.results import eval_markdown
from ramgguf.sensitivity import result as sensitivities
from ramgguf.sensitivity.journal import Journal as SensitivityJournal

_MODULES = (
    check_result, curves, gguf_io, gguf_shard, gguf_values, hessian, imatrix, journal, line_file,
    line_journal, recipes, result_files, results, schema, sensitivities,
)  # fmt: skip
_DOCUMENTS = [(type(d), d.to_json()) for d in made_documents.documents()]
_OPENED: dict[str, Callable[[Path], contextlib.AbstractContextManager[object]]] = {
    "eval": lambda path: Journal(path, resume=True),
    "sensitivity": SensitivityJournal,
    "refine": RefineJournal,
}
_JOURNALS = list(made_documents.journals().items())
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


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Suppress errors of ours; what says more than one line is a finding."""
    try:
        yield
    except RamggufError as e:
        if not str(e).isprintable():
            raise RuntimeError(f"an odd message: {e!r}") from e


def load_documents(data: bytes) -> None:
    """Read the bytes as the files that pass between stages."""
    text = data.decode("utf-8", errors="replace")
    for kind, _ in _DOCUMENTS:
        with refused_in_one_line():
            kind.from_json(text)


def _choices(data: bytes) -> Callable[[int], int]:
    provider = atheris.FuzzedDataProvider(data)
    return lambda n: int(provider.ConsumeIntInRange(0, n - 1))


def load_edits(data: bytes) -> None:
    """Read a document of which the bytes choose the edits: unlike bytes at random, it is JSON."""
    choose = _choices(data)
    kind, text = _DOCUMENTS[choose(len(_DOCUMENTS))]
    for _ in range(1 + choose(3)):
        text = made_documents.edited(text, choose)
    with refused_in_one_line():
        document = kind.from_json(text)
        if isinstance(document, EvalResult):
            eval_markdown([document])
        elif isinstance(document, Plan):
            _ = document.sha256(), document.bpw
        elif isinstance(document, Measurement):
            _ = document.n_weights, [p.sqnr_db for t in document.tensors for p in t.points]
        elif isinstance(document, Recipe):
            _ = document.n_weights, document.bpw


def load_journals(data: bytes) -> None:
    """Go on with a journal of which the bytes choose lines and their edits, and the last's end."""
    choose = _choices(data)
    kind, lines = _JOURNALS[choose(len(_JOURNALS))]
    chosen = []
    for line in lines:
        chosen += [made_documents.edited(line, choose) if choose(3) == 2 else line] * choose(3)
    content = "\n".join(chosen).encode() + b"\n" * choose(2)
    _PATH.write_bytes(content[: len(content) - choose(3)])
    with refused_in_one_line(), _OPENED[kind](_PATH) as found:
        if isinstance(found, Journal):
            _ = found.results()


def load_results(data: bytes) -> None:
    """Read the bytes as results: JSON, JSON lines and CSV, by their first byte."""
    suffix = {b"{": ".json", b"m": ".csv"}.get(data[:1], ".jsonl")
    path = _PATH.with_suffix(suffix)
    path.write_bytes(data.lstrip(b"\n"))
    with refused_in_one_line():
        for result in read_material([path]).results:
            _ = result.kld_mean, [(s.ppl, s.nll_per_token()) for s in result.sequences]
    path.unlink()


def load_importance(data: bytes) -> None:
    """Read the bytes as an importance matrix, GGUF or .dat by their magic."""
    _PATH.write_bytes(data)
    with refused_in_one_line():
        for entry in load_imatrix(_PATH).entries.values():
            if not (entry.values >= 0).all():
                raise RuntimeError(f"{entry.name!r} holds what is no mean square")


def load_grams(data: bytes) -> None:
    """Read the bytes as Hessians."""
    _PATH.write_bytes(data)
    with refused_in_one_line():
        found = load_hessians(_PATH)
        for name in found.owners:
            found.get(name, 4)


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
        "edits": load_edits,
        "results": load_results,
        "journals": load_journals,
        "imatrix": load_importance,
        "hessian": load_grams,
    }
    target = targets[sys.argv.pop(1)]
    instrument()
    try:
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
    finally:
        _PATH.unlink(missing_ok=True)
