"""Files that `compare` and `report` read: results, published figures, plans and measurements."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import ResultError
from ramgguf.core.inputs import read_text
from ramgguf.evaluate.common_sequences import why_missing
from ramgguf.evaluate.continuations import (
    TrajectoryResult,
    has_trajectories,
    read_trajectories,
)
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.journal import read_journal
from ramgguf.evaluate.leaderboard import Aggregate
from ramgguf.evaluate.published_table import TABLE_SUFFIXES, published_table
from ramgguf.evaluate.result import EvalResult
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan


@dataclass(frozen=True)
class Material:
    """What some files hold, in their order; plans and measurements with their file's name."""

    results: tuple[EvalResult, ...] = ()
    embeddings: tuple[EmbeddingResult, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()
    plans: tuple[tuple[str, Plan], ...] = ()
    measurements: tuple[tuple[str, Measurement], ...] = ()
    notes: tuple[str, ...] = ()
    trajectories: tuple[TrajectoryResult, ...] = ()


def read_material(paths: Sequence[Path]) -> Material:
    """Return what the files hold. Raises RamggufError for a file that is none of the known kinds.

    JSON lines are the `--output` of eval, JSON its `--json`, a single result, a plan or a
    measurement; a table (CSV, tabs, Markdown) has a row of published figures per model.
    """
    parts = [_read(path) for path in paths]
    return Material(
        results=tuple(r for p in parts for r in p.results),
        embeddings=tuple(e for p in parts for e in p.embeddings),
        aggregates=tuple(a for p in parts for a in p.aggregates),
        plans=tuple(x for p in parts for x in p.plans),
        measurements=tuple(m for p in parts for m in p.measurements),
        trajectories=tuple(t for p in parts for t in p.trajectories),
        notes=tuple(dict.fromkeys(n for p in parts for n in p.notes)),
    )


def _read(path: Path) -> Material:
    if path.suffix.lower() == ".jsonl":
        if path.is_file() and has_trajectories(path):
            return Material(trajectories=read_trajectories(path))
        if results := _lines_of_results(path):
            read = Material(results=results)
        else:
            journal = read_journal(path)
            read = Material(results=journal.results(), embeddings=journal.embeddings)
        if not read.embeddings and not any(r.sequences for r in read.results):
            why = "; ".join(dict.fromkeys(filter(None, map(why_missing, read.results))))
            raise ResultError(
                f"{path} has no evaluation with a finished sequence in it"
                + (f" ({why})" if why else "")
            )
        return read
    text = _text(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        aggregates, notes = published_table(text, name=str(path))
        return Material(aggregates=aggregates, notes=notes)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ResultError(f"{path} is not JSON ({e}); was it cut short?") from None
    kind = str(data.get("schema", "")) if isinstance(data, dict) else ""
    match kind.partition("/")[0]:
        case "ramgguf.eval":
            return Material(results=(EvalResult.from_json(text, name=str(path)),))
        case "ramgguf.embeddings":
            return Material(embeddings=(EmbeddingResult.from_json(text, name=str(path)),))
        case "ramgguf.embedding-evaluation" if isinstance(data.get("results"), list):
            texts = [json.dumps(r) for r in data["results"]]
            return Material(
                embeddings=tuple(EmbeddingResult.from_json(t, name=str(path)) for t in texts)
            )
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


def _lines_of_results(path: Path) -> tuple[EvalResult, ...]:
    """Return the results of a file with a whole one a line, as bench/results has; else nothing."""
    text = _text(path)
    head = text[: text.find("\n") + 1] or text
    try:
        first = json.loads(head)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(first, dict) or not isinstance(first.get("result"), dict):
        return ()
    if first["result"].get("schema") is None:
        return ()
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        name = f"{path}: line {number}"
        try:
            result = json.loads(line)["result"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ResultError(f"{name} holds no result, unlike the first line") from None
        found.append(EvalResult.from_json(json.dumps(result), name=name))
    return tuple(found)


def _text(path: Path) -> str:
    return read_text(path, error=ResultError)
