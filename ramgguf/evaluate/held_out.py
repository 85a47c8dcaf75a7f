"""Score files against their source on the package's own texts of several domains, in a minute.

Windows of the domains take turns until the time is over, so that every domain has as many. A
window's first tokens are read and not scored: there a model has no context, and in many models
the first token carries a massive activation whose KLD hides all others.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
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
from ramgguf.core.version import __version__
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.statistics import MIN_UNITS, FloatArray
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.client import Engine, with_kernels
from ramgguf.llama.domains import domain_corpora
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
    seconds: float = SECONDS,
    max_rounds: int = MAX_ROUNDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[HeldOutScore, ...]:
    """Return the score of each model against the reference, all on the same windows.

    A window of every domain is scored whatever it takes; more follow while the seconds last, up to
    max_rounds of each; calls with the same max_rounds score the same windows in the same order.
    Tokens before first_target (at least 1) are read and not scored.

    Raises EngineError when llama.cpp is missing or fails, GGUFError for files that are no models.
    """
    paths = [local_path(m) for m in models]
    source = local_path(reference)
    threads = threads or default_threads()
    shown = progress or Silent()

    def run(safe_kernels: bool) -> tuple[HeldOutScore, ...]:
        return _score(
            paths,
            source,
            part,
            n_ctx,
            first_target,
            seconds,
            max_rounds,
            threads,
            safe_kernels,
            shown,
        )

    return with_kernels(run)


def _score(
    paths: Sequence[Path],
    source: Path,
    part: Part,
    n_ctx: int,
    first_target: int,
    seconds: float,
    max_rounds: int,
    threads: int,
    safe_kernels: bool,
    progress: Progress,
) -> tuple[HeldOutScore, ...]:
    start = time.perf_counter()
    found: list[list[WindowScore]] = [[] for _ in paths]
    with Engine(
        [source, *paths], n_ctx=n_ctx, n_threads=threads, safe_kernels=safe_kernels
    ) as engine:
        rounds = list(_rounds(_windows(engine, source, part, n_ctx), max_rounds))
        began = time.perf_counter()
        progress.start("score", len(rounds), "rounds")
        try:
            for number, windows in enumerate(rounds):
                each = (time.perf_counter() - began) / max(1, number)
                if number and time.perf_counter() - began + each > seconds:
                    break
                for domain, ids in windows.items():
                    scored = list(engine.score(number, ids, first_target, has_reference=True))
                    for path, mine, told in zip(paths, found, scored[1:], strict=True):
                        mine.append(_window_score(path, domain, told))
                progress.advance(1)
        finally:
            progress.finish()
        build = engine.opened.system.build
    spent = time.perf_counter() - start
    return tuple(
        HeldOutScore(
            ramgguf_version=__version__,
            model=str(path),
            n_bytes=_n_bytes(path),
            reference=str(source),
            part=part,
            n_ctx=n_ctx,
            first_target=first_target,
            engine=build,
            windows=tuple(windows),
            seconds=spent,
        )
        for path, windows in zip(paths, found, strict=True)
    )


def _n_bytes(path: Path) -> int:
    with open_gguf(path) as file:
        return file.n_bytes


def _window_score(path: Path, domain: str, scored: Scored) -> WindowScore:
    against = scored.divergences
    if against is None:
        raise EngineError(
            f"{path}: {scored.n_broken} of {scored.n_scored} tokens of a window ({domain}) have "
            "logits that are NaN or infinite"
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
