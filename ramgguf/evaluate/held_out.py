"""Score files against their source on the package's own texts of several domains, in a minute.

Windows of the domains take turns until the time is over, so that every domain has as many. A
window's first tokens are read and not scored: there a model has no context, and in many models
the first token carries a massive activation whose KLD hides all others.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ramgguf.core.documents import Document, FrozenModel, NonNegativeFloat, Number, Positive
from ramgguf.core.errors import EngineError
from ramgguf.core.mix import Part
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.statistics import MIN_UNITS, FloatArray
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.client import Engine, with_kernels
from ramgguf.llama.domains import domain_corpora
from ramgguf.llama.logits_file import Layout, LogitsFile, LogitsWriter
from ramgguf.llama.protocol import Scored, TokenIds
from ramgguf.llama.system import llama_installed

N_CTX = 256
FIRST_TARGET = 8
SECONDS = 60.0
MAX_ROUNDS = 12  # windows per domain
N_RESAMPLES = 4000


class WindowScore(FrozenModel):
    """A window's sums over its scored tokens, in nats, against the source."""

    domain: str
    n_tokens: Positive
    kld_sum: Number
    nll_sum: Number
    reference_nll_sum: Number
    n_same_top: Annotated[int, Field(ge=0)]


class HeldOutScore(Document):
    """What one file loses against its source, on texts that nothing else has used.

    Tokens first_target … n_ctx − 1 of every window are scored. part names the texts.
    """

    KIND: ClassVar[str] = "held-out-score"

    ramgguf_version: str
    model: str
    n_bytes: Positive
    reference: str
    part: str
    n_ctx: Positive
    first_target: Positive
    engine: str
    windows: Annotated[tuple[WindowScore, ...], Field(min_length=1)]
    seconds: NonNegativeFloat

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the order of the texts."""
        return tuple(dict.fromkeys(w.domain for w in self.windows))

    def of(self, domain: str) -> "DomainScore":
        """Return the score of one domain."""
        return DomainScore.of([w for w in self.windows if w.domain == domain])

    def overall(self) -> "DomainScore":
        """Return the score of all windows; every domain counts alike, and is resampled alone."""
        return DomainScore.of(self.windows)


@dataclass(frozen=True)
class DomainScore:
    """KLD in nats per token, PPL as a ratio to the source's, and the share of equal top tokens.

    Each has its 95 % interval by bootstrap over windows, if there are enough of them.
    """

    n_windows: int
    n_tokens: int
    kld: Estimate
    ppl_ratio: Estimate
    same_top: Estimate

    @classmethod
    def of(cls, windows: Sequence[WindowScore]) -> "DomainScore":
        """Return the score of the windows: sums over sums, resampled within each domain."""
        sums = np.array(
            [
                (w.n_tokens, w.kld_sum, w.nll_sum - w.reference_nll_sum, w.n_same_top)
                for w in windows
            ],
            np.float64,
        )
        counts = resamples([w.domain for w in windows])
        value = _figures(sums.sum(0)[None])[:, 0]
        drawn = _figures(counts @ sums)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=1)
        claimed = len(windows) >= MIN_UNITS
        kld, ppl, top = (
            Estimate(float(v), float(a), float(b)) if claimed else Estimate(float(v))
            for v, a, b in zip(value, low, high, strict=True)
        )
        return cls(len(windows), int(sums[:, 0].sum()), kld, ppl, top)


def _figures(sums: FloatArray) -> FloatArray:
    """Return KLD, PPL ratio and same top (3, n) of sums (n, 4)."""
    n, kld, nll, same = sums.T
    return np.stack([kld / n, np.exp(np.minimum(nll / n, 700.0)), same / n])


def resamples(domains: Sequence[str], n_resamples: int = N_RESAMPLES) -> FloatArray:
    """Return how often each window is in a draw (n_resamples, n), drawn within its own domain."""
    rng = np.random.default_rng(0)
    counts = np.zeros((n_resamples, len(domains)))
    for domain in dict.fromkeys(domains):
        mine = [i for i, d in enumerate(domains) if d == domain]
        counts[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), n_resamples)
    return counts


def scores_here() -> bool:
    """Return whether files can be scored here: whether llama.cpp is installed."""
    return llama_installed()


def score_held_out(
    models: Sequence[str | Path],
    reference: str | Path,
    *,
    part: Part = "score",
    n_ctx: int = N_CTX,
    first_target: int = FIRST_TARGET,
    seconds: float | None = SECONDS,
    max_rounds: int = MAX_ROUNDS,
    reference_logits: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[HeldOutScore, ...]:
    """Return the score of each model against the reference, all on the same windows.

    A window of every domain is scored whatever it takes; more follow while the seconds last (None:
    as long as it takes), up to max_rounds of each; calls with the same max_rounds score the same
    windows in the same order. Tokens before first_target (at least 1) are read and not scored.

    reference_logits is a file that keeps what the reference says (kept_bytes of it, in 16 bits): it
    is made if it is not there, and read instead of the reference if it is. It goes without a limit
    of time, and belongs to these windows. The reference is then in memory alone.

    Raises EngineError when llama.cpp is missing or fails, GGUFError for files that are no models.
    """
    if reference_logits is not None and seconds is not None:
        raise ValueError("reference_logits needs all windows: give seconds=None")
    texts = _Texts(part, n_ctx, first_target, max_rounds)
    scoring = _Scoring(
        [local_path(m) for m in models],
        local_path(reference),
        texts,
        math.inf if seconds is None else seconds,
        reference_logits,
        threads or default_threads(),
        progress or Silent(),
    )
    return with_kernels(scoring.scores)


def kept_bytes(file: GGUFFile, n_ctx: int, n_windows: int, first_target: int = FIRST_TARGET) -> int:
    """Return the bytes of reference_logits: two for each token of the vocabulary and row."""
    embedding = next((t for t in file.tensors if t.name == "token_embd.weight"), None)
    n_vocab = embedding.n_weights // embedding.row_length if embedding is not None else 1 << 18
    return Layout(n_ctx, n_vocab, n_windows, first_target - 1).n_bytes


def window_seconds(
    model: Path, *, part: Part = "gate", n_ctx: int = N_CTX, threads: int | None = None
) -> float:
    """Return the seconds that scoring one window of the first domain takes; loading is not in it.

    Raises EngineError as score_held_out does.
    """
    texts = _Texts(part, n_ctx, FIRST_TARGET, 1)
    scoring = _Scoring([], model, texts, math.inf, None, threads or default_threads(), Silent())
    return with_kernels(scoring.window_seconds)


@dataclass(frozen=True)
class _Texts:
    """Which windows are scored."""

    part: Part
    n_ctx: int
    first_target: int
    max_rounds: int


@dataclass(frozen=True)
class _Scoring:
    """Models that are scored on the windows of some texts."""

    paths: Sequence[Path]
    source: Path
    texts: _Texts
    limit: float
    kept: Path | None
    threads: int
    progress: Progress

    def scores(self, safe_kernels: bool) -> tuple[HeldOutScore, ...]:
        """Return each model's score."""
        start = time.perf_counter()
        if self.kept is not None and not self.kept.exists():
            self._keep(self.kept, safe_kernels)
        first = [] if self.kept is not None else [self.source]
        with self._engine([*first, *self.paths], safe_kernels) as engine:
            found = self._scored(engine)
            build = engine.opened.system.build
        spent = time.perf_counter() - start
        return tuple(
            HeldOutScore(
                ramgguf_version=__version__,
                model=str(path),
                n_bytes=_n_bytes(path),
                reference=str(self.source),
                part=self.texts.part,
                n_ctx=self.texts.n_ctx,
                first_target=self.texts.first_target,
                engine=build,
                windows=tuple(windows),
                seconds=spent,
            )
            for path, windows in zip(self.paths, found, strict=True)
        )

    def window_seconds(self, safe_kernels: bool) -> float:
        """Return the seconds of the first window, by the source."""
        with self._engine([self.source], safe_kernels) as engine:
            ids = next(iter(self._rounds(engine)[0].values()))
            start = time.perf_counter()
            list(engine.score(0, ids, self.texts.first_target, has_reference=False))
            return time.perf_counter() - start

    def _engine(self, paths: Sequence[Path], safe_kernels: bool) -> Engine:
        n_ctx = self.texts.n_ctx
        return Engine(paths, n_ctx=n_ctx, n_threads=self.threads, safe_kernels=safe_kernels)

    def _keep(self, path: Path, safe_kernels: bool) -> None:
        """Write the file of the reference's logits."""
        with self._engine([self.source], safe_kernels) as engine:
            windows = [ids for one in self._rounds(engine) for ids in one.values()]
            n_vocab = engine.opened.models[0].vocab.n_tokens
            first = self.texts.first_target - 1
            layout = Layout(self.texts.n_ctx, n_vocab, len(windows), first)
            writer = LogitsWriter(path, layout, np.concatenate(windows), resume=False)
            with writer, self._shown("reference", len(windows), "windows"):
                for number, ids in enumerate(windows):
                    to = str(writer.part)
                    list(engine.score(number, ids, first + 1, has_reference=False, save_logits=to))
                    self.progress.advance(1)
                writer.finish()

    def _scored(self, engine: Engine) -> list[list[WindowScore]]:
        """Return the scores of each model's windows."""
        found: list[list[WindowScore]] = [[] for _ in self.paths]
        rounds = self._rounds(engine)
        if self.kept is not None:
            self._require_windows(self.kept, [ids for one in rounds for ids in one.values()])
        index, began = 0, time.perf_counter()
        with self._shown("score", len(rounds), "rounds"):
            for number, windows in enumerate(rounds):
                each = (time.perf_counter() - began) / max(1, number)
                if number and time.perf_counter() - began + each > self.limit:
                    break
                for domain, ids in windows.items():
                    scored = self._window(engine, index, ids)
                    for path, mine, score in zip(self.paths, found, scored, strict=True):
                        mine.append(_window_score(path, domain, score))
                    index += 1
                self.progress.advance(1)
        return found

    def _window(self, engine: Engine, index: int, ids: TokenIds) -> list[Scored]:
        first = self.texts.first_target
        if self.kept is None:
            return list(engine.score(index, ids, first, has_reference=True))[1:]
        stored = str(self.kept)
        return list(engine.score(index, ids, first, has_reference=False, reference_logits=stored))

    def _rounds(self, engine: Engine) -> list[dict[str, TokenIds]]:
        windows = _windows(engine, self.source, self.texts.part, self.texts.n_ctx)
        return list(_rounds(windows, self.texts.max_rounds))

    def _require_windows(self, kept: Path, windows: Sequence[TokenIds]) -> None:
        wanted = np.concatenate(windows)
        if not np.array_equal(LogitsFile(kept).tokens[: len(wanted)], wanted):
            raise EngineError(f"{self.source}: another tokenizer than the files that are scored")

    @contextmanager
    def _shown(self, doing: str, total: int, unit: str) -> Iterator[None]:
        self.progress.start(doing, total, unit)
        try:
            yield
        finally:
            self.progress.finish()


def _n_bytes(path: Path) -> int:
    with open_gguf(path) as file:
        return file.n_bytes


def _window_score(path: Path, domain: str, scored: Scored) -> WindowScore:
    against = scored.divergences
    if against is None:
        whose = path if scored.in_model else f"the reference of {path}"
        raise EngineError(
            f"{whose}: logits that are NaN or infinite at {scored.n_broken} of "
            f"{format_count(scored.n_scored, 'token')} of a window ({domain})"
        )
    return WindowScore(
        domain=domain,
        n_tokens=scored.n_scored,
        kld_sum=against.kld_sum,
        nll_sum=scored.nll_sum,
        reference_nll_sum=against.reference_nll_sum,
        n_same_top=against.n_same_top,
    )


def _windows(
    engine: Engine, source: Path, part: Part, n_ctx: int
) -> dict[str, tuple[TokenIds, ...]]:
    """Return the consecutive windows of every domain, each with BOS where the tokenizer adds it."""
    vocab = engine.opened.models[0].vocab
    for info in engine.opened.models[1:]:
        if info.vocab.sha256 != vocab.sha256:
            raise EngineError(f"{source}: another tokenizer than the files that are to be scored")
    with open_gguf(source) as file:
        corpora = domain_corpora(file, part)
    found = {}
    for domain, corpus in corpora.items():
        ids, _ = engine.tokenize(
            corpus.text, add_special=False, control_tokens=corpus.has_control_tokens
        )
        windows = [ids[i : i + n_ctx].copy() for i in range(0, len(ids) - n_ctx + 1, n_ctx)]
        for window in windows:
            if vocab.adds_bos:
                window[0] = vocab.bos
        found[domain] = tuple(windows)
    return found


def _rounds(
    windows: Mapping[str, Sequence[TokenIds]], max_rounds: int
) -> Iterator[dict[str, TokenIds]]:
    """Yield a window of every domain at a time, spread over its text."""
    n_rounds = min(max_rounds, min(map(len, windows.values())))
    if n_rounds == 0:
        short = min(windows, key=lambda domain: len(windows[domain]))
        raise EngineError(f"the text of the domain {short} is shorter than a window")
    # Spread over the text, and in an order in which a few are spread as well.
    order = np.random.default_rng(0).permutation(n_rounds)
    for i in order:
        yield {d: w[int(i) * len(w) // n_rounds] for d, w in windows.items()}
