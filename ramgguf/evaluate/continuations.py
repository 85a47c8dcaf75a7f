"""Greedy continuations by a model and its reference: where the two first part.

KLD is the distance at each token of a given text. What a user sees is a text that the model writes
itself, in which one other token changes all that follow.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from ramgguf.core.documents import Document, FrozenModel, NonNegative, NonNegativeFloat, Positive
from ramgguf.core.errors import EngineError
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.evaluate.corpora import DOMAINS, refuse_equal, scored_texts
from ramgguf.evaluate.evaluation import identify
from ramgguf.evaluate.intervals import Estimate, quantile_estimate, share_estimate
from ramgguf.evaluate.record_journal import RecordJournal
from ramgguf.evaluate.result import ModelFile, sha256_int32
from ramgguf.evaluate.statistics import SequenceLosses
from ramgguf.gguf.hub import local_path
from ramgguf.llama.client import Engine, with_kernels
from ramgguf.llama.protocol import TokenIds, pack_ids, unpack_ids

N_PROMPTS, PROMPT_TOKENS, N_TOKENS, BATCH = 100, 32, 300, 16
SHORT = 32  # tokens of a short answer, of which the share of equal ones is reported, too


class Prompt(FrozenModel):
    """Where a prompt comes from: its domain and the document there; its tokens."""

    domain: str
    document: str
    ids: str


class TrajectoryProtocol(FrozenModel):
    """What is generated: n_tokens after each prompt, `batch` prompts side by side."""

    n_tokens: Positive
    batch: Positive
    prompts: tuple[Prompt, ...]
    safe_kernels: bool
    llama_cpp_build: str


class TrajectoryResult(Document):
    """How many tokens of a model's continuations are its reference's, prompt by prompt.

    agreed counts the equal tokens before the first other one; None: all n_tokens are equal, or all
    up to an end of generation that both reach.
    """

    KIND: ClassVar[str] = "trajectories"

    ramgguf_version: str
    model: ModelFile
    reference: ModelFile
    n_tokens: Positive
    batch: Positive
    llama_cpp_build: str
    safe_kernels: bool
    prompts_sha256: str
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    documents: tuple[str, ...]
    agreed: tuple[NonNegative | None, ...]
    seconds: NonNegativeFloat = 0.0

    def survival(self, n: int, domain: str | None = None) -> Estimate:
        """Return the share of prompts whose first n tokens are the reference's, with interval."""
        kept = self._kept(domain)
        agreed = [self.agreed[i] for i in kept]
        hits = np.array([a is None or a >= n for a in agreed], np.float64)
        return share_estimate(hits, self._sample(kept))

    def median(self, domain: str | None = None) -> Estimate:
        """Return the median of equal tokens; n_tokens where that many or more are equal."""
        kept = self._kept(domain)
        agreed = [self.agreed[i] for i in kept]
        values = np.array([self.n_tokens if a is None else a for a in agreed], np.float64)
        return quantile_estimate(values, self._sample(kept), 0.5)

    def curve(self) -> tuple[tuple[int, Estimate], ...]:
        """Return the survival at every length where it falls, and at the ends."""
        at = sorted({0, self.n_tokens, *(a + 1 for a in self.agreed if a is not None)})
        return tuple((n, self.survival(n)) for n in at)

    def _kept(self, domain: str | None) -> list[int]:
        return [i for i, d in enumerate(self.domains) if domain in (None, d)]

    def _sample(self, kept: Sequence[int]) -> SequenceLosses:
        """Return the prompts as units of intervals: those of a document are one."""
        names = [self.documents[i] for i in kept]
        group = np.unique(names, return_inverse=True)[1].astype(np.int64)
        ones = np.ones(len(kept), np.int64)
        return SequenceLosses(nll_sum=ones.astype(np.float64), n_tokens=ones, group=group)


@dataclass(frozen=True)
class Trajectories:
    """The results in the order of the models."""

    results: tuple[TrajectoryResult, ...]


@protected()
def trajectories(
    models: Sequence[str | Path],
    reference: str | Path,
    *,
    n_prompts: int = N_PROMPTS,
    n_tokens: int = N_TOKENS,
    domains: Sequence[str] = tuple(DOMAINS),
    batch: int = BATCH,
    jsonl: str | Path | None = None,
    resume: bool = False,
    safe_kernels: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """Return where greedy continuations of each model part from the reference's.

    Prompts are spread evenly over the domains (names or files, as for eval's corpus). Models are
    loaded one after the other. jsonl takes every batch as it finishes; with resume, what it has is
    not generated again: the reference need not be there twice. Raises EngineError when llama.cpp
    fails, or the models' tokenizers differ.
    """
    source = local_path(reference)
    paths = [local_path(m) for m in models]
    if not paths:
        raise EngineError("there is no model to compare with the reference")
    shown = progress or Silent()
    with _Journal(Path(jsonl) if jsonl is not None else None, resume=resume) as journal:

        def compared(safe: bool) -> Trajectories:
            run = _Run(journal, shown, threads or default_threads(), safe)
            return run.compare(paths, source, n_prompts, n_tokens, domains, batch)

        return with_kernels(compared, safe_kernels)


@dataclass
class _Run:
    journal: "_Journal"
    progress: Progress
    threads: int
    safe_kernels: bool

    def compare(
        self,
        paths: Sequence[Path],
        source: Path,
        n_prompts: int,
        n_tokens: int,
        domains: Sequence[str],
        batch: int,
    ) -> Trajectories:
        files = [identify(path) for path in (source, *paths)]
        protocol, vocab = self._protocol(source, n_prompts, n_tokens, domains, batch)
        self.progress.start("generate", len(files) * len(protocol.prompts), "prompts")
        try:
            written = [self._continue(file, protocol, vocab) for file in files]
        finally:
            self.progress.finish()
        expected, seconds = written[0]
        return Trajectories(
            tuple(
                _result(file, files[0], protocol, expected, ids, seconds + own)
                for file, (ids, own) in zip(files[1:], written[1:], strict=True)
            )
        )

    def _open(self, path: Path) -> Engine:
        return Engine([path], n_ctx=512, n_threads=self.threads, safe_kernels=self.safe_kernels)

    def _protocol(
        self, source: Path, n_prompts: int, n_tokens: int, domains: Sequence[str], batch: int
    ) -> tuple[TrajectoryProtocol, str]:
        with self._open(source) as engine:
            vocab = engine.opened.models[0].vocab
            made = _prompts(engine, source, n_prompts, domains, vocab.bos if vocab.adds_bos else -1)
            protocol = TrajectoryProtocol(
                n_tokens=n_tokens,
                batch=batch,
                prompts=tuple(made),
                safe_kernels=self.safe_kernels,
                llama_cpp_build=engine.opened.system.build,
            )
        return protocol, vocab.sha256

    def _continue(
        self, file: ModelFile, protocol: TrajectoryProtocol, vocab: str
    ) -> tuple[list[TokenIds], float]:
        """Return the model's continuations of all prompts, and the seconds that they took."""
        done = self.journal.begin(file, protocol)
        prompts = [unpack_ids(p.ids) for p in protocol.prompts]
        batches = range(0, len(prompts), protocol.batch)
        self.progress.advance(sum(len(d.ids) for d in done.values()))
        if any(start not in done for start in batches):
            with self._open(Path(file.path)) as engine:
                if engine.opened.models[0].vocab.sha256 != vocab:
                    raise EngineError(f"{file.path}: its tokenizer is not the reference's")
                for start in (s for s in batches if s not in done):
                    part = prompts[start : start + protocol.batch]
                    ids, seconds = engine.generate(part, protocol.n_tokens)
                    self.journal.add(file, protocol, start, ids, seconds)
                    self.progress.advance(len(ids))
        done = self.journal.begin(file, protocol)
        ids = [unpack_ids(text) for start in batches for text in done[start].ids]
        return ids, sum(done[start].seconds for start in batches)


def _prompts(
    engine: Engine, source: Path, n_prompts: int, domains: Sequence[str], bos: int
) -> Iterator[Prompt]:
    """Yield prompts spread evenly over the domains and over each one's text."""
    texts = scored_texts(domains, source)
    refuse_equal(texts, [PROMPT_TOKENS])
    counts = [len(part) for part in np.array_split(np.arange(n_prompts), len(texts))]
    for name, text, n in zip(domains, texts, counts, strict=True):
        corpus = text.corpus
        ids, ends = engine.tokenize(
            corpus.text, add_special=False, control_tokens=corpus.has_control_tokens
        )
        n_windows = len(ids) // PROMPT_TOKENS
        if n_windows < n:
            raise EngineError(
                f"{name} gives {format_count(n_windows, 'prompt')} of {PROMPT_TOKENS} tokens, {n} "
                "are needed: use fewer prompts, more domains or a longer text"
            )
        for k in range(n):
            start = (k * n_windows // n) * PROMPT_TOKENS
            window = ids[start : start + PROMPT_TOKENS].copy()
            if bos >= 0:
                window[0] = bos
            at = int(ends[start])
            title = corpus.title_at(max(0, at - 1))
            document = f"{name}: {title}" if title is not None else f"{name} at byte {at}"
            yield Prompt(domain=Path(name).name, document=document, ids=pack_ids(window))


def _result(
    file: ModelFile,
    reference: ModelFile,
    protocol: TrajectoryProtocol,
    expected: Sequence[TokenIds],
    found: Sequence[TokenIds],
    seconds: float,
) -> TrajectoryResult:
    return TrajectoryResult(
        ramgguf_version=__version__,
        model=file,
        reference=reference,
        n_tokens=protocol.n_tokens,
        batch=protocol.batch,
        llama_cpp_build=protocol.llama_cpp_build,
        safe_kernels=protocol.safe_kernels,
        prompts_sha256=sha256_int32(np.concatenate([unpack_ids(p.ids) for p in protocol.prompts])),
        domains=tuple(p.domain for p in protocol.prompts),
        documents=tuple(p.document for p in protocol.prompts),
        agreed=tuple(agreed(a, b) for a, b in zip(expected, found, strict=True)),
        seconds=seconds,
    )


def agreed(expected: TokenIds, found: TokenIds) -> int | None:
    """Return how many tokens agree before the first that does not; None where all do."""
    n = min(len(expected), len(found))
    differs = np.flatnonzero(expected[:n] != found[:n])
    if len(differs):
        return int(differs[0])
    return None if len(expected) == len(found) else n


# --- the file ---


class RunRecord(FrozenModel):
    """A model's run begins."""

    record: Literal["trajectory-run"] = "trajectory-run"
    run: str
    model: ModelFile
    protocol: TrajectoryProtocol


class BatchRecord(FrozenModel):
    """The continuations of the prompts from `start` on, base64 of little-endian int32 each."""

    record: Literal["trajectory-batch"] = "trajectory-batch"
    run: str
    start: NonNegative
    ids: tuple[str, ...]
    seconds: NonNegativeFloat


_ADAPTER: TypeAdapter[RunRecord | BatchRecord] = TypeAdapter(
    Annotated[RunRecord | BatchRecord, Field(discriminator="record")]
)


class _Journal(RecordJournal[RunRecord | BatchRecord]):
    """Finished batches by run; with a path, also on disk. Use as a context manager."""

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self.runs: dict[str, RunRecord] = {}
        self.done: dict[str, dict[int, BatchRecord]] = {}
        super().__init__(path, _ADAPTER, "trajectories", resume=resume)

    def _take(self, record: RunRecord | BatchRecord) -> None:
        if isinstance(record, RunRecord):
            self.runs[record.run] = record
        else:
            self.done.setdefault(record.run, {})[record.start] = record

    def begin(self, model: ModelFile, protocol: TrajectoryProtocol) -> dict[int, BatchRecord]:
        """Return what is done of the model's run, which is announced once."""
        run = _run_id(model, protocol)
        if run not in self.runs:
            self.record(RunRecord(run=run, model=model, protocol=protocol))
        return self.done.setdefault(run, {})

    def add(
        self,
        model: ModelFile,
        protocol: TrajectoryProtocol,
        start: int,
        ids: Sequence[TokenIds],
        seconds: float,
    ) -> None:
        """Record a finished batch."""
        run = _run_id(model, protocol)
        packed = tuple(pack_ids(one) for one in ids)
        self.record(BatchRecord(run=run, start=start, ids=packed, seconds=seconds))

    def results(self) -> tuple[TrajectoryResult, ...]:
        """Return the results of the whole runs; the first of a protocol is the reference's."""
        groups: dict[str, list[RunRecord]] = {}
        for run in self.runs.values():
            groups.setdefault(run.protocol.model_dump_json(), []).append(run)
        found = []
        for first, *others in groups.values():
            expected = self._whole(first)
            for run in others:
                ids = self._whole(run)
                if expected is None or ids is None:
                    continue
                seconds = sum(d.seconds for r in (first, run) for d in self.done[r.run].values())
                found.append(_result(run.model, first.model, run.protocol, expected, ids, seconds))
        return tuple(found)

    def _whole(self, run: RunRecord) -> list[TokenIds] | None:
        done = self.done.get(run.run, {})
        ids = [unpack_ids(text) for _, part in sorted(done.items()) for text in part.ids]
        return ids if len(ids) == len(run.protocol.prompts) else None


def _run_id(model: ModelFile, protocol: TrajectoryProtocol) -> str:
    said = model.model_dump_json() + protocol.model_dump_json()
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def has_trajectories(path: Path) -> bool:
    """Return whether the file is what `trajectories -o` writes, as its first line says."""
    with path.open("rb") as file:
        return b'"trajectory-run"' in file.read(64)


def read_trajectories(path: Path) -> tuple[TrajectoryResult, ...]:
    """Return the finished results in a file that `trajectories -o` wrote."""
    return _Journal(None, resume=False).read(path).results()
