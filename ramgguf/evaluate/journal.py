"""The file to which an evaluation writes each sequence as it finishes, and from which it goes on.

One JSON object per line: a run (one model under one protocol) announces itself, then come its
sequences.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel, NonNegativeFloat
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.record_journal import RecordJournal
from ramgguf.evaluate.result import BrokenSequence, EvalResult, SequenceScore, kld_figures


class RunRecord(FrozenModel):
    """A run begins; result has everything but the sequences."""

    record: Literal["run"] = "run"
    run: str
    result: EvalResult


class SequenceRecord(FrozenModel):
    """A sequence of a run is finished: its scores, or that its logits were broken.

    cpu is the name of the CPU that computed it, where that is not the run's.
    """

    record: Literal["sequence"] = "sequence"
    run: str
    index: int
    score: SequenceScore | None = None
    broken: BrokenSequence | None = None
    seconds: NonNegativeFloat
    decode_seconds: NonNegativeFloat
    cpu: str | None = None


class EmbeddingRecord(FrozenModel):
    """An embedding model was compared with its original."""

    record: Literal["embeddings"] = "embeddings"
    result: EmbeddingResult


class FailureRecord(FrozenModel):
    """A run ended early; what is missing is tried again when the evaluation is resumed."""

    record: Literal["failure"] = "failure"
    run: str
    message: str


AnyRecord = RunRecord | SequenceRecord | EmbeddingRecord | FailureRecord
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="record")])


def run_id(result: EvalResult) -> str:
    """Return what tells runs apart: a hash over what a result without sequences says, but notes.

    Runs with the same one (same files, tokens, llama.cpp, CPU, settings) give the same numbers.
    """
    said = result.model_copy(update={"notes": ()}).model_dump_json(exclude={"cpus"})
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _but_cpu(result: EvalResult) -> EvalResult:
    engine = result.engine.model_copy(update={"cpu": ""})
    return result.model_copy(update={"notes": (), "engine": engine})


def read_journal(path: Path) -> "Journal":
    """Return what is in a file that an evaluation wrote. Raises EngineError if it is none.

    The file is not touched: the evaluation may still be writing it.
    """
    return Journal(None, resume=False).read(path)


def read_results(path: Path) -> tuple[EvalResult, ...]:
    """Return the results of language models in a file that an evaluation wrote."""
    return read_journal(path).results()


class Journal(RecordJournal[AnyRecord]):
    """Finished sequences by run; with a path, also on disk. Use as a context manager."""

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self._done: dict[str, dict[int, SequenceRecord]] = {}
        self._announced: dict[str, EvalResult] = {}
        self._failures: dict[str, str] = {}
        self._embeddings: list[EmbeddingResult] = []
        super().__init__(path, _ADAPTER, "an evaluation", resume=resume)

    def done(self, run: str) -> dict[int, SequenceRecord]:
        """Return the run's finished sequences by index."""
        return self._done.setdefault(run, {})

    def begin(self, blank: EvalResult) -> tuple[str, EvalResult]:
        """Return the run of which this is the result without sequences, and what it announced.

        A run goes on where only the CPU's name is another: what kernels are chosen by are its
        features, which the engine's settings tell.
        """
        run = run_id(blank)
        if run not in self._announced:
            wanted = _but_cpu(blank)
            run = next((r for r, a in self._announced.items() if _but_cpu(a) == wanted), run)
        self.announce(run, blank)
        return run, self._announced[run]

    def announce(self, run: str, result: EvalResult) -> None:
        """Record that the run begins, once."""
        if run not in self._announced:
            self.record(RunRecord(run=run, result=result))

    def add(self, record: SequenceRecord) -> None:
        """Record a finished sequence."""
        self.record(record)

    def fail(self, run: str, message: str) -> None:
        """Record why a run ended early."""
        self.record(FailureRecord(run=run, message=message))

    def result(self, run: str) -> EvalResult:
        """Return the run's result: what was announced, with its finished sequences."""
        blank = self._announced[run]
        records = [record for _, record in sorted(self.done(run).items())]
        sequences = tuple(r.score for r in records if r.score is not None)
        broken = tuple(r.broken for r in records if r.broken is not None)
        others = {r.cpu for r in records if r.cpu is not None}
        missing = blank.protocol.n_seq - len(sequences) - len(broken)
        return blank.model_copy(
            update={
                "sequences": sequences,
                "broken": broken,
                "cpus": tuple(sorted({blank.engine.cpu, *others})) if others else (),
                **kld_figures(sequences),
                "failure": self._failures.get(run) if missing else None,
                "seconds": sum(r.seconds for r in records),
                "decode_seconds": sum(r.decode_seconds for r in records),
            }
        )

    def results(self) -> tuple[EvalResult, ...]:
        """Return the results of all models, each from its last run that scored a sequence.

        A model of which no run scored one has a result without sequences.
        """
        last: dict[tuple[str, ...], EvalResult] = {}
        for run in self._announced:
            found = self.result(run)
            model = found.model
            protocol = found.protocol.model_dump_json()
            run_of = (model.path, model.header_sha256, found.text.sha256, protocol)
            key = (*run_of, model.sample_sha256 or "")
            if model.sample_sha256 is not None:
                last.pop((*run_of, ""), None)  # of a version that took no sample
            if found.sequences or key not in last:
                last[key] = found
        return tuple(last.values())

    @property
    def embeddings(self) -> tuple[EmbeddingResult, ...]:
        """The results of embedding models, each model's last one for the same texts."""
        last: dict[tuple[str, str, str], EmbeddingResult] = {}
        for found in self._embeddings:
            key = (found.model.path, found.model.header_sha256, found.token_ids_sha256)
            last.pop(key, None)
            last[key] = found
        return tuple(last.values())

    def add_embeddings(self, result: EmbeddingResult) -> None:
        """Record that an embedding model was compared with its original."""
        self.record(EmbeddingRecord(result=result))

    def embeddings_like(self, blank: EmbeddingResult) -> EmbeddingResult | None:
        """Return the result of which this one has everything but texts and time, if it is there."""
        wanted = blank.model_copy(update={"notes": ()})
        for found in self._embeddings:
            if found.model_copy(update={"texts": (), "seconds": 0.0, "notes": ()}) == wanted:
                return found
        return None

    def _take(self, record: AnyRecord) -> None:
        match record:
            case RunRecord():
                self._announced[record.run] = record.result
            case SequenceRecord():
                self.done(record.run)[record.index] = record
            case EmbeddingRecord():
                self._embeddings.append(record.result)
            case FailureRecord():
                self._failures[record.run] = record.message
