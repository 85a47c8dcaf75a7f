"""Embedding models against their original: cosines of embeddings, agreement of similarities.

Such a model predicts no token: it has neither perplexity nor KLD. What its users do with it is to
rank texts by similarity, so that is compared, beside the embeddings themselves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import EngineError
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.evaluate.embedding_result import N_NEIGHBOURS, EmbeddingResult, TextScore
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.evaluate.result import EngineSettings, ModelFile, sha256_int32
from ramgguf.evaluate.statistics import MIN_UNITS, FloatArray
from ramgguf.llama.client import CrashError, Engine, ModelError
from ramgguf.llama.protocol import Opened, TokenIds, decode_float32

N_CTX, N_TEXTS = 512, 128
MIN_TEXT_BYTES = 80  # shorter lines are headings and scraps


@dataclass(frozen=True)
class Span:
    """A line of the corpus: from start to end in its UTF-8 bytes."""

    start: int
    end: int


@dataclass(frozen=True)
class EmbeddingSettings:
    """How embedding models are compared with their original, and on what."""

    protocol: EvalProtocol
    reference: ModelFile
    threads: int
    safe_kernels: bool | None
    verbose: bool


@dataclass(frozen=True)
class _Tokenized:
    """The texts as tokens; tokens of one text are cut to n_ctx, with what ends a text."""

    spans: tuple[Span, ...]
    ids: tuple[TokenIds, ...]
    n_lines: int
    n_ctx: int
    notes: tuple[str, ...]


def embed_models(
    files: Sequence[ModelFile], settings: EmbeddingSettings, journal: Journal, progress: Progress
) -> tuple[tuple[EmbeddingResult, ...], tuple[str, ...]]:
    """Return the results of the models that could be compared, and a message for each other one.

    Results that the journal has are not computed again. Where llama.cpp's repacked kernels crash
    (safe_kernels None), all models are embedded without them. Raises EngineError when the original
    cannot be embedded, or an option has no meaning for embedding models.
    """
    _refuse_options(settings)
    if settings.safe_kernels is not None:
        return _embed(files, settings, journal, progress, safe_kernels=settings.safe_kernels)
    try:
        return _embed(files, settings, journal, progress, safe_kernels=False)
    except CrashError as e:
        note = f"embedded without llama.cpp's repacked kernels, because: {e}"
        return _embed(files, settings, journal, progress, safe_kernels=True, note=note)


def _refuse_options(settings: EmbeddingSettings) -> None:
    what = "an embedding model predicts no token, so it is compared on lines of the text"
    if settings.protocol.protocol == "llama":
        raise EngineError(f"protocol llama scores predicted tokens, and {what}; leave it out")
    if settings.protocol.bos:
        raise EngineError(f"--bos starts sequences to predict, and {what}; leave it out")


def _embed(
    files: Sequence[ModelFile],
    settings: EmbeddingSettings,
    journal: Journal,
    progress: Progress,
    *,
    safe_kernels: bool,
    note: str | None = None,
) -> tuple[tuple[EmbeddingResult, ...], tuple[str, ...]]:
    protocol, reference = settings.protocol, settings.reference
    n_ctx = protocol.n_ctx or N_CTX

    def opened(file: ModelFile) -> Engine:
        return Engine(
            [Path(file.path)], n_ctx=n_ctx, n_threads=settings.threads,
            safe_kernels=safe_kernels, verbose=settings.verbose, embeds=True,
        )  # fmt: skip

    with opened(reference) as engine:
        first, texts = engine.opened, _tokenized(engine, protocol, n_ctx)
        progress.start("embed", (len(files) + 1) * len(texts.ids), "texts")
        try:
            original = _embeddings(engine, texts, progress)
        except BaseException:
            progress.finish()
            raise
    results, failures = [], []
    try:
        for file in files:
            try:
                with opened(file) as engine:
                    _require_alike(file, engine.opened, reference, first)
                    blank = _blank(file, settings, texts, engine.opened, safe_kernels, note)
                    found = journal.embeddings_like(blank)
                    if found is None:
                        start = time.perf_counter()
                        vectors = _embeddings(engine, texts, progress)
                        scores = _scores(protocol.corpus, texts, original, vectors)
                        seconds = time.perf_counter() - start
                        update = {"texts": scores, "seconds": seconds}
                        found = blank.model_copy(update=update)
                        journal.add_embeddings(found)
                    results.append(found)
            except CrashError as e:
                if settings.safe_kernels is None and not safe_kernels:
                    raise
                failures.append(str(e))
            except (ModelError, EngineError) as e:
                failures.append(str(e))
    finally:
        progress.finish()
    return tuple(results), tuple(failures)


def _tokenized(engine: Engine, protocol: EvalProtocol, n_ctx: int) -> _Tokenized:
    """Return the texts that the protocol draws, as the original's tokenizer reads them."""
    trained = engine.opened.models[0].n_ctx_train
    notes: list[str] = []
    if protocol.n_ctx is not None and n_ctx > trained:
        notes.append(f"texts are cut to the {trained} tokens that the model has positions for")
    n_ctx = min(n_ctx, trained)
    corpus = protocol.corpus
    lines = text_lines(corpus)
    n = protocol.n_seq or N_TEXTS
    if min(n, len(lines)) < MIN_UNITS:
        raise EngineError(
            f"{corpus.name} has {format_count(len(lines), 'line')} of at least {MIN_TEXT_BYTES} "
            f"bytes, {format_count(n, 'text')} asked for; similarities need at least {MIN_UNITS} "
            "texts"
        )
    if n > len(lines):
        notes.append(f"the text gives {format_count(len(lines), 'text')}, not {n}: all are used")
    spans = draw_lines(lines, n, protocol.seed)
    ids = [_text_ids(engine, corpus, span, n_ctx) for span in spans]
    cut = sum(was_cut for _, was_cut in ids)
    if cut:
        notes.append(f"cut to {n_ctx} tokens: {cut} of {format_count(len(ids), 'text')}")
    return _Tokenized(spans, tuple(i for i, _ in ids), len(lines), n_ctx, tuple(notes))


def text_lines(corpus: Corpus) -> tuple[Span, ...]:
    """Return the lines of the corpus that are long enough to be texts."""
    found, start = [], 0
    for line in corpus.bytes.split(b"\n"):
        if len(line.strip()) >= MIN_TEXT_BYTES:
            found.append(Span(start, start + len(line)))
        start += len(line) + 1
    return tuple(found)


def draw_lines(lines: Sequence[Span], n: int, seed: int) -> tuple[Span, ...]:
    """Return n of the lines, drawn without replacement, in their order; all if there are fewer."""
    if n >= len(lines):
        return tuple(lines)
    drawn = np.random.default_rng(seed).choice(len(lines), size=n, replace=False)
    return tuple(lines[i] for i in np.sort(drawn))


def _text_ids(engine: Engine, corpus: Corpus, span: Span, n_ctx: int) -> tuple[TokenIds, bool]:
    """Return a text's token ids with the tokenizer's special ones, and whether they were cut."""
    text = corpus.bytes[span.start : span.end].decode("utf-8", "replace").strip()
    ids, _ = engine.tokenize(text, add_special=True)
    if len(ids) <= n_ctx:
        return ids, False
    plain, _ = engine.tokenize(text, add_special=False)
    n_tail = int(len(plain) > 0 and ids[-1] != plain[-1])  # [SEP] or EOS, which belongs at the end
    return np.concatenate([ids[: n_ctx - n_tail], ids[len(ids) - n_tail :]]), True


def _embeddings(engine: Engine, texts: _Tokenized, progress: Progress) -> FloatArray:
    """Return the texts' embeddings (texts, values), each of length 1."""
    rows = []
    for index, ids in enumerate(texts.ids):
        (found,) = engine.embed(index, ids)
        rows.append(decode_float32(found.vector).astype(np.float64))
        progress.advance(1)
    vectors = np.stack(rows)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _require_alike(file: ModelFile, opened: Opened, reference: ModelFile, first: Opened) -> None:
    mine, its = opened.models[0], first.models[0]
    if mine.vocab.sha256 != its.vocab.sha256:
        raise EngineError(
            f"{file.path}: its tokenizer ({mine.vocab.n_tokens} tokens) is not the reference's "
            f"({its.vocab.n_tokens} tokens of {reference.path})"
        )
    if mine.pooling != its.pooling:
        raise EngineError(
            f"{file.path} pools its tokens by {mine.pooling}, {reference.path} by {its.pooling}: "
            "one of them lacks its pooling type; convert it again"
        )


def _blank(
    file: ModelFile,
    settings: EmbeddingSettings,
    texts: _Tokenized,
    opened: Opened,
    safe_kernels: bool,
    note: str | None,
) -> EmbeddingResult:
    info, protocol = opened.models[0], settings.protocol
    return EmbeddingResult(
        ramgguf_version=__version__,
        model=file,
        reference=settings.reference,
        text=protocol.corpus.identity,
        n_ctx=texts.n_ctx,
        n_lines=texts.n_lines,
        seed=protocol.seed,
        pooling=info.pooling,
        tokenizer_sha256=info.vocab.sha256,
        token_ids_sha256=sha256_int32(np.concatenate(texts.ids)),
        engine=EngineSettings.of(opened, settings.threads, safe_kernels=safe_kernels),
        texts=(),
        notes=(*texts.notes, *((note,) if note else ())),
    )


def _scores(
    corpus: Corpus, texts: _Tokenized, original: FloatArray, vectors: FloatArray
) -> tuple[TextScore, ...]:
    agreement = rank_agreement(original, vectors)
    cosines = np.clip(np.sum(original * vectors, axis=1), -1, 1)
    return tuple(
        TextScore(
            title=corpus.title_at((span.start + span.end) // 2),
            text_start=span.start,
            text_end=span.end,
            excerpt=corpus.excerpt(span.start, span.end),
            n_tokens=len(texts.ids[i]),
            cosine=float(cosines[i]),
            spearman=float(agreement.spearman[i]),
            same_nearest=bool(agreement.same_nearest[i]),
            same_neighbours=float(agreement.same_neighbours[i]),
        )
        for i, span in enumerate(texts.spans)
    )


@dataclass(frozen=True, eq=False)
class RankAgreement:
    """Per text, how its similarities to all others rank alike under two models, as in TextScore."""

    spearman: FloatArray
    same_nearest: npt.NDArray[np.bool_]
    same_neighbours: FloatArray


def rank_agreement(a: FloatArray, b: FloatArray) -> RankAgreement:
    """Return how the cosines among the rows of a (texts, values) rank as those among b's do.

    Rows have length 1. Among equally similar texts, any may be the nearest.
    """
    from scipy import stats  # takes half a second, which other commands need not wait

    n = len(a)
    others = ~np.eye(n, dtype=bool)
    first, second = ((x @ x.T)[others].reshape(n, n - 1) for x in (a, b))
    ranks = [stats.rankdata(x, axis=1) for x in (first, second)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    scale = np.sqrt(np.sum(x * x, axis=1) * np.sum(y * y, axis=1))
    flat = scale == 0  # all texts are equally near, under one of the models
    spearman = np.where(flat, 0.0, np.sum(x * y, axis=1) / np.where(flat, 1.0, scale))
    spearman[(x == y).all(axis=1)] = 1.0
    row = np.arange(n)
    nearest = second[row, first.argmax(axis=1)] == second.max(axis=1)
    k = min(N_NEIGHBOURS, n - 1)
    top = [np.argsort(-x, axis=1, kind="stable")[:, :k] for x in (first, second)]
    shared = [len(np.intersect1d(p, q)) / k for p, q in zip(*top, strict=True)]
    return RankAgreement(np.clip(spearman, -1, 1), nearest, np.array(shared))
