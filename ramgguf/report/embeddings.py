"""Evaluations of embedding models, for people and for programs."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from ramgguf.core.escape import markdown_text
from ramgguf.core.units import format_bytes
from ramgguf.evaluate.embedding_report import (
    EmbeddingPair,
    EmbeddingReport,
    EmbeddingSummary,
    TextDistances,
    embedding_report,
)
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.embeddings import MIN_TEXT_BYTES
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.statistics import n_units
from ramgguf.report.grid import Field, Grid, grid_of, to_markdown
from ramgguf.report.numbers import percent, ratio, with_interval
from ramgguf.report.terminal import print_grid, print_statements

TITLE = "Embeddings against the original's (95 % intervals)"


def near_one(found: Estimate) -> str:
    """Return a cosine or correlation, with digits that tell it from 1: 0.99873 (0.9982–0.9991)."""
    gap = 1 - found.value
    digits = 4 if gap <= 0 else min(7, max(3, math.ceil(-math.log10(gap)) + 2))
    return with_interval(found, lambda x: f"{x:.{digits}f}")


def embedding_grid(report: EmbeddingReport) -> Grid:
    """Return a row per model: size, cosines of embeddings, agreement of similarities."""

    def shown(name: str) -> Callable[[EmbeddingSummary], str]:
        return lambda s: near_one(s.estimates[name])

    def share(name: str) -> Callable[[EmbeddingSummary], str]:
        return lambda s: with_interval(_percentage(s.estimates[name]), percent)

    fields: list[Field[EmbeddingSummary]] = [
        Field("model", lambda s: s.label, number=False),
        Field("size", lambda s: format_bytes(s.result.model.n_bytes)),
        Field("bpw", lambda s: f"{s.result.model.bpw:.2f}", 3),
        Field("mean cosine", shown("mean_cosine")),
        Field("median", shown("median_cosine"), 4),
        Field("P5", shown("p5_cosine")),
        Field("min", shown("min_cosine"), 1),
        Field("rank ρ", shown("mean_spearman")),
        Field("same nearest", share("same_nearest")),
        Field("same 10 nearest", share("same_neighbours"), 2),
    ]
    return grid_of(TITLE, fields, report.summaries)


def _percentage(found: Estimate) -> Estimate:
    low, high = (None if x is None else 100 * x for x in (found.low, found.high))
    return Estimate(100 * found.value, low, high)


def verdict_lines(report: EmbeddingReport) -> tuple[str, ...]:
    """Return which model is nearest to the original, and whether the next differs significantly."""
    if not report.summaries:
        return ()
    if report.pairs:
        return tuple(_pair_sentence(pair) for pair in report.pairs)
    return tuple(_alone(s) for s in report.summaries)


def _alone(s: EmbeddingSummary) -> str:
    r = s.result
    nearest = s.estimates["same_nearest"].value
    return (
        f"{s.label}: mean cosine {near_one(s.estimates['mean_cosine'])} to {r.reference.label}, at"
        f" {r.model.n_bytes / r.reference.n_bytes:.0%} of its size; the most similar text stays the"
        f" same for {nearest:.0%} of {len(r.texts)} texts."
    )


def _pair_sentence(pair: EmbeddingPair) -> str:
    said = [
        f"{what} {ratio(found)} × {pair.b}’s"
        for what, found in (("1 − cosine", pair.cosine), ("1 − rank ρ", pair.rank))
    ]
    resolved = pair.cosine.high is not None and pair.cosine.high < 1
    relation = "nearer to the original than" if resolved else "not told apart from"
    parts = pair.rank.low is not None and pair.rank.low > 1
    but = "; ranks of similarities say the opposite" if parts else ""
    return f"{pair.a}: {relation} {pair.b}: {', '.join(said)}{but}."


def statements(report: EmbeddingReport) -> tuple[str, ...]:
    """Return notes, why results are not compared, and how each was measured."""
    said = [f"Not ranked: {report.refusal}."] if report.refusal else []
    notes = (f"{n}." for s in report.summaries for n in s.result.notes)
    return tuple(dict.fromkeys((*said, *notes, *(protocol_line(s) for s in report.summaries))))


def protocol_line(s: EmbeddingSummary) -> str:
    """Return how a result was measured, in one sentence."""
    r = s.result
    units = "articles" if any(t.title for t in r.texts) else "texts"
    n = n_units(TextDistances.of(r))
    return (
        f"Texts: {len(r.texts)} of {r.n_lines} lines of {r.text.name} of at least {MIN_TEXT_BYTES}"
        f" bytes, drawn with seed {r.seed}, of at most {r.n_ctx} tokens; pooling {r.pooling};"
        f" llama.cpp {r.engine.llama_cpp_build}{', safe kernels' if r.engine.safe_kernels else ''};"
        f" intervals over {n} {units}."
    )


def print_embeddings(results: Sequence[EmbeddingResult], console: Console) -> None:
    """Print the verdict, the table, notes and how it was measured."""
    report = embedding_report(results)
    for line in verdict_lines(report):
        console.print(line, soft_wrap=not console.is_terminal)
    console.print()
    print_grid(console, embedding_grid(report))
    console.print()
    print_statements(console, statements(report))


def embeddings_markdown(results: Sequence[EmbeddingResult]) -> str:
    """Return the verdict, the table and notes as markdown."""
    report = embedding_report(results)
    verdict = "".join(f"{markdown_text(line)}\n\n" for line in verdict_lines(report))
    items = "".join(f"- {markdown_text(s)}\n" for s in statements(report))
    table = to_markdown(embedding_grid(report))
    return f"### Evaluation\n\n{verdict}**{TITLE}**\n\n{table}\n{items}"


def embeddings_csv(results: Sequence[EmbeddingResult]) -> str:
    """Return a row per model with every estimate in full precision; an absent one is empty."""
    rows = [dict(_flat(s)) for s in embedding_report(results).summaries]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def embeddings_json(results: Sequence[EmbeddingResult]) -> str:
    """Return estimates, comparisons and results with every text, as one document."""
    report = embedding_report(results)
    document = {
        "schema": "ramgguf.embedding-evaluation/1",
        "models": [dict(_flat(s)) for s in report.summaries],
        "pairs": [
            {"a": p.a, "b": p.b, **_ratio("cosine_distance", p.cosine), **_ratio("rank", p.rank)}
            for p in report.pairs
        ],
        "verdict": list(verdict_lines(report)),
        "statements": list(statements(report)),
        "results": [json.loads(r.to_json()) for r in results],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)


def _ratio(name: str, found: Estimate) -> dict[str, float | None]:
    value = found.value if math.isfinite(found.value) else None
    return {f"{name}_ratio": value, f"{name}_low": found.low, f"{name}_high": found.high}


def _flat(s: EmbeddingSummary) -> Iterator[tuple[str, str | int | float | None]]:
    r = s.result
    yield from (
        ("model", s.label),
        ("path", r.model.path),
        ("n_bytes", r.model.n_bytes),
        ("bpw", r.model.bpw),
        ("reference", r.reference.path),
        ("n_texts", len(r.texts)),
    )
    for name, found in s.estimates.items():
        yield from ((name, found.value), (f"{name}_low", found.low), (f"{name}_high", found.high))
    yield from (
        ("pooling", r.pooling),
        ("token_ids_sha256", r.token_ids_sha256),
        ("llama_cpp_build", r.engine.llama_cpp_build),
    )
