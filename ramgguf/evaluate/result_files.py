"""Files that `compare` and `report` read: results, published figures, plans and measurements."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.journal import read_results
from ramgguf.evaluate.leaderboard import Aggregate
from ramgguf.evaluate.result import EvalResult
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan

_NUMBERS = ("corpus_ppl", "mean_ppl", "median_ppl", "mean_kld")


@dataclass(frozen=True)
class Material:
    """What some files hold, in their order; plans and measurements with their file's name."""

    results: tuple[EvalResult, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()
    plans: tuple[tuple[str, Plan], ...] = ()
    measurements: tuple[tuple[str, Measurement], ...] = ()


def read_material(paths: Sequence[Path]) -> Material:
    """Return what the files hold. Raises RamggufError for a file that is none of the known kinds.

    JSON lines are the `--output` of eval, JSON its `--json`, a single result, a plan or a
    measurement; CSV has a row of published figures per model.
    """
    parts = [_read(path) for path in paths]
    return Material(
        results=tuple(r for p in parts for r in p.results),
        aggregates=tuple(a for p in parts for a in p.aggregates),
        plans=tuple(x for p in parts for x in p.plans),
        measurements=tuple(m for p in parts for m in p.measurements),
    )


def _read(path: Path) -> Material:
    if path.suffix.lower() == ".jsonl":
        results = read_results(path)
        if not any(r.sequences for r in results):
            raise ResultError(f"{path} has no evaluation with a finished sequence in it")
        return Material(results=results)
    text = _text(path)
    if path.suffix.lower() == ".csv":
        return Material(aggregates=_aggregates(path, text))
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ResultError(f"{path} is not JSON ({e}); was it cut short?") from None
    kind = str(data.get("schema", "")) if isinstance(data, dict) else ""
    match kind.partition("/")[0]:
        case "ramgguf.eval":
            return Material(results=(EvalResult.from_json(text, name=str(path)),))
        case "ramgguf.evaluation" if isinstance(data.get("results"), list):
            texts = [json.dumps(r) for r in data["results"]]
            return Material(results=tuple(EvalResult.from_json(t, name=str(path)) for t in texts))
        case "ramgguf.plan":
            return Material(plans=((path.stem, Plan.from_json(text, name=str(path))),))
        case "ramgguf.measurement":
            found = Measurement.from_json(text, name=str(path))
            return Material(measurements=((path.stem, found),))
    raise ResultError(
        f"{path}: schema is {kind!r}; expected what eval, plan or measure wrote (JSON, JSON lines)"
        " or published figures (CSV)"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ResultError(f"{path} cannot be read: {e}") from None


def _aggregates(path: Path, text: str) -> tuple[Aggregate, ...]:
    """Return the figures of a CSV file with the columns model, n_bytes, corpus_ppl, ..."""
    try:
        rows = list(csv.DictReader(text.splitlines()))
    except csv.Error as e:
        raise ResultError(f"{path} is not CSV ({e})") from None
    if not rows or not rows[0].get("model"):
        columns = ", ".join(("model", "n_bytes", *_NUMBERS, "n_outliers"))
        raise ResultError(f"{path} has no column 'model'; expected a header with {columns}")
    return tuple(
        Aggregate(
            label=row["model"] or "",
            n_bytes=None if (size := _number(path, row, "n_bytes")) is None else int(size),
            corpus_ppl=_number(path, row, "corpus_ppl"),
            mean_ppl=_number(path, row, "mean_ppl"),
            median_ppl=_number(path, row, "median_ppl"),
            mean_kld=_number(path, row, "mean_kld"),
            n_outliers=None if (n := _number(path, row, "n_outliers")) is None else int(n),
        )
        for row in rows
    )


def _number(path: Path, row: Mapping[str, str | None], column: str) -> float | None:
    text = row.get(column)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ResultError(f"{path}: {column} of {row['model']} is {text!r}, expected a number ≥ 0")
    return value
