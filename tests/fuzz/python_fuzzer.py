"""Atheris target: whatever a file holds, opening it succeeds or raises an error of ours.

What opens is then used, as the commands use it: a header is measured, planned with and carded, a
Hessian and an importance matrix encode rows, results are compared and drawn.

usage: python_fuzzer.py TARGET [options of libFuzzer] [folder of seeds]
"""

import contextlib
import inspect
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris
import numpy as np
import numpy.typing as npt
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf_samples
import made_documents
import made_results
from ramgguf import _core
from ramgguf.core import line_file, line_journal
from ramgguf.core.errors import GGUFError, RamggufError
from ramgguf.deploy import result as check_result
from ramgguf.evaluate import common_sequences, comparison, journal, leaderboard, result_files
from ramgguf.evaluate import result as results
from ramgguf.evaluate.common_sequences import check_comparable
from ramgguf.evaluate.comparison import compare_published
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.gguf import header as gguf_values
from ramgguf.gguf import reader as gguf_io
from ramgguf.gguf import shards as gguf_shard
from ramgguf.gguf.reader import open_gguf, require_language_model
from ramgguf.measure import measure, rate_distortion
from ramgguf.measure.result import Measurement
from ramgguf.plan import curve, explain, planning, recipes
from ramgguf.plan import frontier_result as curves
from ramgguf.plan import plan as make_plan
from ramgguf.plan import result as schema
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import Plan
from ramgguf.quants import formats, hessian, imatrix
from ramgguf.quants.encoders import gptq, libggml
from ramgguf.quants.hessian import gram_name, load_hessians, new_hessians
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.refine.journal import RefineJournal
from ramgguf.report import card as cards
from ramgguf.report import card_sources, evaluation, verdict
from ramgguf.report import page as pages
from ramgguf.report.boards import board_csv, board_json, board_markdown
from ramgguf.report.card import model_card
from ramgguf.report.page import page
from ramgguf.report.results import eval_csv, eval_json, eval_markdown, print_eval, report_of
from ramgguf.sensitivity import result as sensitivities
from ramgguf.sensitivity.journal import Journal as SensitivityJournal

_MODULES = (
    card_sources, cards, check_result, common_sequences, comparison, curves, evaluation, gguf_io,
    gguf_shard, gguf_values, gptq, hessian, imatrix, journal, leaderboard, line_file, line_journal,
    pages, planning, rate_distortion, recipes, result_files, results, schema, sensitivities,
    verdict,
)  # fmt: skip
_DOCUMENTS = [(type(d), d.to_json()) for d in made_documents.documents()]
_OPENED: dict[str, Callable[[Path], contextlib.AbstractContextManager[object]]] = {
    "eval": lambda path: Journal(path, resume=True),
    "sensitivity": SensitivityJournal,
    "refine": RefineJournal,
}
_JOURNALS = list(made_documents.journals().items())
_SOUND = gguf_samples.quantizable().bytes()
_RESULTS = [
    made_documents.result().to_json(),
    made_results.eval_result(
        "n", [7.0, 9.5, 30.0], reference=("base", [7.0, 8.0, 9.0]), kld=[0.2, 0.1, 0.4]
    ).to_json(),
    made_results.eval_result("base", [7.0, 8.0, 9.0], n_bytes=4_000_000).to_json(),
]
_FOLDER = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_RANDOM = np.random.default_rng(0)
_ROWS = {
    name: _RANDOM.standard_normal((2, n), dtype=np.float32)
    for name, n in (("Q4_0", 32), ("Q8_0", 32), ("IQ4_NL", 32), ("Q4_K", 256), ("Q2_K", 256))
}
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


def require_shown(text: str) -> None:
    """Raise RuntimeError for what would control a terminal, or reorder what a reader sees."""
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t":
            raise RuntimeError(f"{c!r} is shown as it is")


def use_header(data: bytes) -> None:
    """Do with the bytes what measure, plan, curve, explain, card and report do with a model.

    Bytes that are no GGUF file are edits of one: of three each, a place and what to put there.
    """
    if data[:4] != b"GGUF":
        edited = bytearray(_SOUND)
        for at in range(0, min(len(data), 36) - 2, 3):
            edited[(data[at] << 8 | data[at + 1]) % len(edited)] = data[at + 2]
        data = bytes(edited)
    _PATH.write_bytes(data)
    with refused_in_one_line():
        require_shown(model_card(card_sources.card(_PATH)))
    with refused_in_one_line():
        measured = measure(_PATH, threads=1, formats=["Q8_0", "Q4_0", "Q4_K"])
        planned = make_plan(measured, "100%", min_sqnr_db=0)
        if planned.n_bytes > planned.budget:
            raise RuntimeError(f"{planned.n_bytes} bytes are planned of {planned.budget}")
        curve(measured, min_sqnr_db=0)
        for assignment in planned.assignments[:2]:
            explain(planned, assignment.name)
        page(report_of([]), [("p", planned)], [("m", measured)])


def encode_with_hessian(data: bytes) -> None:
    """Encode rows by GPTQ with every Hessian that the bytes hold, or edit in a sound one."""
    _PATH.write_bytes(data if data[:4] == b"GGUF" else _edited_gram(data))
    with refused_in_one_line():
        found = load_hessians(_PATH)
        for name in list(found.owners)[:4]:
            for type_name, weights in _ROWS.items():
                n = weights.shape[1]
                with refused_in_one_line():
                    factored = found.factored(name, n)
                    ones = np.ones(n, np.float32)
                    blocks = gptq.encode(type_name, weights, factored, ones)
                    _require_encoded(type_name, weights, blocks)
        found.close()


def _edited_gram(data: bytes) -> bytes:
    """Return a file of Hessians with symmetric edits: of the bytes, two places and a float each."""
    n = 32
    inputs = np.random.default_rng(0).standard_normal((64, n), dtype=np.float32)
    gram = inputs.T @ inputs
    for at in range(0, len(data) - 5, 6):
        i, j = data[at] % n, data[at + 1] % n
        gram[i, j] = gram[j, i] = np.frombuffer(data, "<f4", 1, at + 2)[0]
    with new_hessians(_PATH, {"a": "a", "b": "a"}, {"a": n}, 64, force=True) as out:
        out.write(gram_name("a"), gram)
        out.commit()
    return _PATH.read_bytes()


def encode_with_importance(data: bytes) -> None:
    """Encode rows by every encoder with the importance that the bytes hold."""
    _PATH.write_bytes(data)
    with refused_in_one_line():
        loaded = load_imatrix(_PATH)
        for name in list(loaded.entries)[:4]:
            for type_name, weights in _ROWS.items():
                n_rows, n = weights.shape
                with refused_in_one_line():
                    weighed = loaded.importance(name, (n, n_rows))
                    if weighed is not None:
                        _encode(type_name, weights, np.ascontiguousarray(weighed[0]))


def _encode(type_name: str, weights: Floats, importance: Floats) -> None:
    raw = weights.view(np.uint8)
    for encoder in ("rtn", "search"):
        blocks = np.empty((len(raw), formats.row_bytes(type_name, weights.shape[1])), np.uint8)
        _core.encode(type_name, "F32", raw, blocks, encoder=encoder, importance=importance)
        _require_encoded(type_name, weights, blocks)
    if weights.shape[1] % 256 == 0 and libggml.is_installed():
        blocks = libggml.encode("IQ2_XXS", weights, importance)
        if not np.isfinite(libggml.decode("IQ2_XXS", blocks, weights.shape[1])).all():
            raise RuntimeError("libggml encodes what is not finite")


def _require_encoded(type_name: str, weights: Floats, blocks: Bytes) -> None:
    """Raise RuntimeError unless every row is finite, and no worse than zeros would be."""
    decoded = np.empty(weights.shape, np.float32)
    _core.decode(type_name, blocks, decoded)
    if not np.isfinite(decoded).all() or np.abs(decoded).max() > 4 * np.abs(weights).max():
        raise RuntimeError(f"{type_name} holds {decoded!r} for {weights!r}")


def compare_results(data: bytes) -> None:
    """Compare and draw results of which the bytes choose the edits, or published figures."""
    if data[:1] == b"m":
        path = _PATH.with_suffix(".csv")
        path.write_bytes(data)
        with refused_in_one_line():
            material = read_material([path])
            board = compare_published(material.aggregates, material.notes)
            board_markdown(board), board_csv(board), board_json(board)
            page(report_of([]), published=board)
        path.unlink()
        return
    choose = _choices(data)
    texts = []
    for text in _RESULTS[: 1 + choose(3)]:
        for _ in range(choose(3)):
            text = made_documents.edited(text, choose)
        texts.append(text)
    with refused_in_one_line():
        found = [EvalResult.from_json(text) for text in texts]
        check_comparable(found)
        eval_csv(found), eval_json(found)
        print_eval(found, Console(file=io.StringIO(), width=120))
        require_shown(eval_markdown(found))
        page(report_of(found))


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
        "headers-used": use_header,
        "hessian-encode": encode_with_hessian,
        "imatrix-encode": encode_with_importance,
        "results-compared": compare_results,
    }
    target = targets[sys.argv.pop(1)]
    instrument()
    try:
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
    finally:
        _PATH.unlink(missing_ok=True)
