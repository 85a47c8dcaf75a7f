"""Files that `compare` and `report` read: results, published figures, plans and measurements."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ramgguf.errors import ResultError
from ramgguf.journal import FailureRecord, Record, RunRecord, SequenceRecord
from ramgguf.leaderboard import Aggregate
from ramgguf.results import EvalResult, quantiles
from ramgguf.schema import Measurement, Plan

_RECORD: TypeAdapter[RunRecord | SequenceRecord | FailureRecord] = TypeAdapter(Record)
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
    text = _text(path)
    if path.suffix.lower() == ".csv":
        return Material(aggregates=_aggregates(path, text))
    if path.suffix.lower() == ".jsonl":
        return Material(results=_journal(path, text))
    try:
        data = json.loads(text)
    except ValueError as e:
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


def _journal(path: Path, text: str) -> tuple[EvalResult, ...]:
    """Return a result per model and protocol: its last run that scored anything, else its last."""
    begun: dict[str, EvalResult] = {}
    sequences: dict[str, dict[int, SequenceRecord]] = {}
    failures: dict[str, str] = {}
    for record in _records(path, text):
        match record:
            case RunRecord():
                begun[record.run] = record.result
            case SequenceRecord():
                sequences.setdefault(record.run, {})[record.index] = record
            case FailureRecord():
                failures[record.run] = record.message
    found: dict[tuple[str, str], EvalResult] = {}
    for run, blank in begun.items():
        key = (blank.model.path, blank.protocol.model_dump_json())
        result = _assembled(blank, sequences.get(run, {}), failures.get(run))
        if result.sequences or key not in found:
            found[key] = result
    if not found:
        raise ResultError(f"{path} has no evaluation in it")
    return tuple(found.values())


def _records(path: Path, text: str) -> list[RunRecord | SequenceRecord | FailureRecord]:
    records = []
    # a kill may have cut the last line short
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            records.append(_RECORD.validate_json(line))
        except ValidationError as e:
            what = e.errors()[0]["msg"]
            raise ResultError(
                f"{path}: line {number} is no record of an evaluation ({what})"
            ) from None
    return records


def _assembled(
    blank: EvalResult, records: Mapping[int, SequenceRecord], failure: str | None
) -> EvalResult:
    ordered = [records[i] for i in sorted(records)]
    scores = tuple(r.score for r in ordered if r.score is not None)
    klds = [kld for s in scores if (kld := s.kld_per_token()) is not None]
    complete = len(ordered) == blank.protocol.n_seq
    return blank.model_copy(
        update={
            "sequences": scores,
            "broken": tuple(r.broken for r in ordered if r.broken is not None),
            "kld_quantiles": quantiles(np.concatenate(klds)) if klds else None,
            "failure": None if complete else failure,
            "seconds": sum(r.seconds for r in ordered),
            "decode_seconds": sum(r.decode_seconds for r in ordered),
        }
    )


def _aggregates(path: Path, text: str) -> tuple[Aggregate, ...]:
    """Return the figures of a CSV file with the columns model, n_bytes, corpus_ppl, ..."""
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not rows[0].get("model"):
        columns = ", ".join(("model", "n_bytes", *_NUMBERS, "n_outliers"))
        raise ResultError(f"{path} has no column 'model'; expected a header with {columns}")
    return tuple(
        Aggregate(
            label=row["model"],
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
