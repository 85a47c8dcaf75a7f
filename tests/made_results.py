"""Evaluation results made from arrays, for tests of what is said about them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ramgguf.core.corpus import Text
from ramgguf.evaluate.journal import Journal, SequenceRecord, run_id
from ramgguf.evaluate.result import (
    EngineSettings,
    EvalResult,
    ModelFile,
    Protocol,
    SequenceScore,
    quantiles,
)

N_TOKENS = 2047


def model_file(label: str, n_bytes: int = 1_000_000) -> ModelFile:
    return ModelFile(
        path=f"models/{label}.gguf",
        n_bytes=n_bytes,
        header_sha256=label,
        architecture="llama",
        file_type="Q4_K",
        n_weights=2_000_000,
    )


def eval_result(
    label: str,
    ppl: npt.ArrayLike,
    *,
    n_bytes: int = 1_000_000,
    titles: Sequence[str] | None = None,
    indices: Sequence[int] | None = None,
    reference: tuple[str, npt.ArrayLike] | None = None,
    reference_bytes: int = 1_000_000,
    kld: npt.ArrayLike | None = None,
    n_seq: int | None = None,
) -> EvalResult:
    """Return a result of 2,047 scored tokens per sequence with these sequence PPL.

    reference gives its label and sequence PPL, reference_bytes its file's size; then kld is the
    mean KLD of each sequence.
    """
    values = np.asarray(ppl, dtype=np.float64)
    n = len(values)
    places = range(n) if indices is None else indices
    scores = [
        SequenceScore(
            index=i,
            title=None if titles is None else titles[k],
            text_start=1000 * i,
            text_end=1000 * i + 1000,
            excerpt=f"text of window {i}",
            n_scored=N_TOKENS,
            nll_sum=float(np.log(values[k]) * N_TOKENS),
        )
        for k, i in enumerate(places)
    ]
    if reference is not None:
        scores = _with_reference(scores, np.asarray(reference[1]), np.asarray(kld))
    return EvalResult(
        ramgguf_version="0.1.0",
        model=model_file(label, n_bytes),
        reference=None if reference is None else model_file(reference[0], reference_bytes),
        protocol=Protocol(
            name="ram",
            n_ctx=N_TOKENS + 1,
            n_windows=max(places) + 1,
            n_seq=n_seq or n,
            seed=42,
            bos=False,
            first_target=1,
        ),
        text=Text(name="wikitext2-test.txt", n_bytes=1_290_590, sha256="text"),
        tokenizer_sha256="tokenizer",
        token_ids_sha256="tokens",
        engine=EngineSettings(
            llama_cpp_python="0.3.36",
            llama_cpp_build="b1",
            system_info="AVX512 = 1",
            cpu="a CPU",
            n_threads=2,
            n_batch=2048,
            safe_kernels=False,
        ),
        sequences=tuple(scores),
        kld_quantiles=None if kld is None else quantiles(np.asarray(kld)),
    )


def _with_reference(
    scores: list[SequenceScore], ppl: npt.NDArray[np.float64], kld: npt.NDArray[np.float64]
) -> list[SequenceScore]:
    return [
        s.model_copy(
            update={
                "reference_nll_sum": float(np.log(p) * N_TOKENS),
                "kld_sum": float(d * N_TOKENS),
                "kld_max": float(20 * d),
                "n_same_top": int(N_TOKENS * (1 - min(1, 3 * d))),
                "delta_p_sum": float(-0.2 * d * N_TOKENS),
                "delta_p_squared_sum": float(0.1 * d * N_TOKENS),
            }
        )
        for s, p, d in zip(scores, ppl, kld, strict=True)
    ]


def ordinary_ppl(seed: int = 0, n: int = 128, median: float = 8.7) -> npt.NDArray[np.float64]:
    """Return log-normal sequence PPL with a spread of 0.3 nats and exactly this median."""
    values = np.random.default_rng(seed).normal(0, 0.3, n)
    return np.asarray(median * np.exp(values - np.median(values)))


def wild_ppl(seed: int = 0, n: int = 128, median: float = 8.7) -> npt.NDArray[np.float64]:
    """Return ordinary_ppl whose five largest are 25,000 to 81,000: the median stays."""
    values = ordinary_ppl(seed, n, median)
    values[np.argsort(values)[-5:]] = (25_000, 33_000, 47_000, 62_000, 81_000)
    return values


def journal(path: Path, result: EvalResult, *, n: int | None = None, fails: str = "") -> None:
    """Append a run to the journal at path, as eval does, with the first n sequences."""
    blank = result.model_copy(update={"sequences": (), "kld_quantiles": None})
    with Journal(path, resume=True) as written:
        run = run_id(blank)
        written.announce(run, blank)
        for s in result.sequences[:n]:
            written.add(
                SequenceRecord(run=run, index=s.index, score=s, seconds=2.0, decode_seconds=1.5)
            )
        if fails:
            written.fail(run, fails)
