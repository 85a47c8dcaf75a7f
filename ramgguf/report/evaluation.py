"""Evaluations for people and for programs: terminal, markdown for a model card, CSV and JSON."""

import csv
import io
import math
from collections.abc import Iterator

from rich.console import Console

from ramgguf.core.units import format_bytes
from ramgguf.evaluate.bootstrap import Estimate
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.leaderboard import LABELS, Leaderboard
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import n_units
from ramgguf.evaluate.summary import AgainstReference, Summary, losses
from ramgguf.report.grid import Column, Grid, markdown_text, to_markdown
from ramgguf.report.numbers import kld, p_value, percent, ppl, with_interval
from ramgguf.report.sentences import findings, order
from ramgguf.report.terminal import print_grid, print_statements

PPL_TITLE = "Perplexity of sequences (95 % intervals)"


def perplexity_grid(study: EvalReport) -> Grid:
    """Return a row per model: size, corpus PPL first, then what a mean hides."""
    columns = (
        Column("model", number=False),
        Column("size"),
        Column("bpw", 3),
        Column("corpus PPL"),
        Column("median PPL"),
        Column("mean PPL", 4),
        Column("P95", 2),
        Column("P99", 5),
        Column("max", 2),
        Column("MAD", 6),
        Column(f"PPL > {study.outlier_ppl:g}", 1),
        Column("tail", 1, number=False),
    )
    rows = tuple(_perplexity_row(s) for s in study.summaries)
    return Grid(PPL_TITLE, columns, rows)


def _perplexity_row(s: Summary) -> tuple[str, ...]:
    e = s.estimates
    return (
        s.label,
        format_bytes(s.result.model.n_bytes),
        f"{s.result.model.bpw:.2f}",
        with_interval(e["corpus_ppl"], ppl),
        with_interval(e["median_ppl"], ppl),
        ppl(e["mean_ppl"].value),
        with_interval(e["p95_ppl"], ppl),
        ppl(e["p99_ppl"].value),
        ppl(e["max_ppl"].value),
        ppl(e["mad_ppl"].value),
        str(len(s.outliers)),
        s.tail.verdict,
    )


def reference_grid(study: EvalReport) -> Grid | None:
    """Return a row per model that was scored against a reference; None if none was."""
    rows = tuple(_reference_row(s, s.against) for s in study.summaries if s.against is not None)
    if not rows:
        return None
    columns = (
        Column("model", number=False),
        Column("reference", 3, number=False),
        Column("PPL(Q)/PPL(base)"),
        Column("mean KLD"),
        Column("median", 2),
        Column("P90", 4),
        Column("P99", 2),
        Column("max", 3),
        Column("same top p"),
        Column("RMS Δp", 1),
        Column("mean Δp", 5),
        Column("p bootstrap", 6),
        Column("p Wilcoxon", 6),
    )
    references = {row[1] for row in rows}
    if len(references) > 1:
        return Grid("Against the reference (95 % intervals)", columns, rows)
    only = Grid(f"Against {references.pop()} (95 % intervals)", columns, rows)
    return only.without("reference")


def _reference_row(s: Summary, against: AgainstReference) -> tuple[str, ...]:
    q, d = against.quantiles, against.divergences
    p = against.delta_corpus_ppl.p
    return (
        s.label,
        against.label,
        with_interval(against.ppl_ratio, lambda x: f"{x:.4f}"),
        with_interval(d["mean_kld"], kld),
        *((kld(x) for x in (q.median, q.p90, q.p99, q.maximum)) if q else ("",) * 4),
        with_interval(d["same_top_p"], percent),
        with_interval(d["rms_delta_p"], percent),
        percent(d["mean_delta_p"].value),
        "" if p is None else p_value(p),
        p_value(against.wilcoxon_p),
    )


def ranking_grid(board: Leaderboard) -> Grid:
    """Return a row per different ranking, best model first."""
    columns = (Column("ranked by", number=False), Column("best first", number=False))
    criteria: dict[str, list[str]] = {}
    for ranking in board.rankings:
        criteria.setdefault(order(ranking), []).append(LABELS[ranking.criterion])
    rows = tuple((", ".join(names), best_first) for best_first, names in criteria.items())
    return Grid("Rankings", columns, rows)


def protocol_line(result: EvalResult) -> str:
    """Return how the result was measured, in one sentence."""
    p, e = result.protocol, result.engine
    drawn = f"drawn with seed {p.seed} from {p.n_windows}" if p.seed is not None else "in order"
    n = n_units(losses(result))
    units = "articles" if any(s.title for s in result.sequences) else "sequences"
    return (
        f"Protocol {p.name}: {p.n_seq} windows of {p.n_ctx} tokens of {result.text.name}, {drawn},"
        f" {p.n_scored} tokens scored in each, {'BOS' if p.bos else 'no BOS'};"
        f" llama.cpp {e.llama_cpp_build}{', safe kernels' if e.safe_kernels else ''};"
        f" intervals by bootstrap over {n} {units}."
    )


def statements(study: EvalReport) -> tuple[str, ...]:
    """Return what is to be said beside the tables: findings, refusals, failures, notes."""
    said = list(findings(study.board)) if study.board else []
    if study.refusal and len(study.summaries) > 1:
        said.append(f"Not ranked: {study.refusal}.")
    said += [f"{failure}." for failure in study.failures]
    said += [
        f"{s.label} is heavy-tailed (index {s.tail.index:.2f} < 2): its mean PPL, "
        f"{ppl(s.estimates['mean_ppl'].value)}, is {s.tail.mean_over_median:,.3g} times its median."
        for s in study.summaries
        if s.tail.heavy
    ]
    notes = dict.fromkeys(note for s in study.summaries for note in s.result.notes)
    said += [note if note.endswith(".") else f"{note}." for note in notes]
    return tuple(said)


def protocol_lines(study: EvalReport) -> tuple[str, ...]:
    """Return how the results were measured, once for each way."""
    return tuple(dict.fromkeys(protocol_line(s.result) for s in study.summaries))


def print_study(study: EvalReport, console: Console) -> None:
    """Print the tables, the rankings where there are some to compare, and the findings."""
    if study.summaries:
        print_grid(console, perplexity_grid(study))
    against = reference_grid(study)
    if against is not None:
        console.print()
        print_grid(console, against)
    if study.board and len(study.board.rows) > 1:
        console.print()
        print_grid(console, ranking_grid(study.board))
    console.print()
    print_statements(console, (*statements(study), *protocol_lines(study)))


def study_markdown(study: EvalReport) -> str:
    """Return the tables and findings as markdown, ready for a model card."""
    grids = [perplexity_grid(study), reference_grid(study)]
    if study.board and len(study.board.rows) > 1:
        grids.append(ranking_grid(study.board))
    tables = [
        f"**{grid.title}**\n\n{to_markdown(grid.without_empty_columns())}"
        for grid in grids
        if grid is not None and grid.rows
    ]
    items = "".join(f"- {markdown_text(s)}\n" for s in (*statements(study), *protocol_lines(study)))
    return "\n".join(("### Evaluation\n", *tables, items))


def study_csv(study: EvalReport) -> str:
    """Return a row per model with every statistic in full precision; an absent one is empty."""
    rows = [dict(_flat(s)) for s in study.summaries]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def study_json(study: EvalReport) -> dict[str, object]:
    """Return statistics, rankings and findings as JSON values; NaN and infinity become null."""
    rankings = study.board.rankings if study.board else ()
    return {
        "models": [dict(_flat(s)) for s in study.summaries],
        "rankings": {r.criterion: list(r.order) for r in rankings},
        "statements": list(statements(study)),
        "protocols": list(protocol_lines(study)),
    }


Cell = str | int | float | bool | None


def _flat(s: Summary) -> Iterator[tuple[str, Cell]]:
    """Yield the summary's values by name, each interval as NAME_low and NAME_high."""
    r = s.result
    yield from (
        ("model", s.label),
        ("path", r.model.path),
        ("n_bytes", r.model.n_bytes),
        ("bpw", r.model.bpw),
        ("n_sequences", len(r.sequences)),
        ("n_scored_tokens", r.n_scored),
    )
    for name, found in s.estimates.items():
        yield from _estimate(name, found)
    yield from (
        ("outlier_ppl", s.outlier_ppl),
        ("n_outliers", len(s.outliers)),
        ("tail_index", _finite(s.tail.index)),
        ("mean_over_median", s.tail.mean_over_median),
        ("tail", s.tail.verdict),
    )
    if s.against is not None:
        yield from _flat_reference(s.against)
    yield from (
        ("protocol", r.protocol.name),
        ("tokenizer_sha256", r.tokenizer_sha256),
        ("token_ids_sha256", r.token_ids_sha256),
        ("llama_cpp_build", r.engine.llama_cpp_build),
        ("safe_kernels", r.engine.safe_kernels),
    )


def _flat_reference(against: AgainstReference) -> Iterator[tuple[str, Cell]]:
    yield "reference", against.label
    yield "reference_corpus_ppl", against.reference_corpus_ppl
    yield from _estimate("ppl_ratio", against.ppl_ratio)
    yield from _estimate("delta_corpus_ppl", against.delta_corpus_ppl)
    yield "p_bootstrap", against.delta_corpus_ppl.p
    yield "p_wilcoxon", against.wilcoxon_p
    for name, found in against.divergences.items():
        yield from _estimate(name, found)
    if q := against.quantiles:
        yield from (
            ("median_kld", q.median),
            ("p90_kld", q.p90),
            ("p99_kld", q.p99),
            ("p999_kld", q.p999),
            ("max_kld", q.maximum),
        )


def _estimate(name: str, found: Estimate) -> Iterator[tuple[str, Cell]]:
    yield name, _finite(found.value)
    yield f"{name}_low", found.low
    yield f"{name}_high", found.high


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
