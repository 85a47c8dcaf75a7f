"""Evaluations for people and for programs: terminal, markdown for a model card, CSV and JSON."""

import csv
import io
import math
from collections.abc import Callable, Iterator

from rich.console import Console

from ramgguf.core.escape import markdown_text, printable
from ramgguf.core.units import format_bytes, format_count
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.leaderboard import LABELS, Leaderboard
from ramgguf.evaluate.result import FIRST_TOKENS, EvalResult, Protocol
from ramgguf.evaluate.statistics import n_units
from ramgguf.evaluate.summary import AgainstReference, Summary, losses
from ramgguf.report.chart import chart
from ramgguf.report.grid import Column, Field, Grid, grid_of, to_markdown
from ramgguf.report.numbers import kld, p_value, percent, ppl, with_interval
from ramgguf.report.sentences import findings, order
from ramgguf.report.terminal import print_grid, print_statements
from ramgguf.report.verdict import verdict_lines
from ramgguf.report.where import NO_PLACES, kld_sentences, where_grids, where_json

PPL_TITLE = "Perplexity of sequences (95 % intervals)"


def perplexity_grid(report: EvalReport) -> Grid:
    """Return a row per model: size, corpus PPL first, then what a mean hides."""
    return grid_of(PPL_TITLE, _perplexity_fields(report), report.summaries)


def _perplexity_fields(report: EvalReport) -> list[Field[Summary]]:
    def interval(name: str) -> Callable[[Summary], str]:
        return lambda s: with_interval(s.estimates[name], ppl)

    def value(name: str) -> Callable[[Summary], str]:
        return lambda s: ppl(s.estimates[name].value)

    return [
        Field("model", lambda s: s.label, number=False),
        Field("size", lambda s: format_bytes(m.n_bytes) if (m := s.result.model).is_model else ""),
        Field("bpw", lambda s: f"{m.bpw:.2f}" if (m := s.result.model).is_model else "", 3),
        Field("corpus PPL", interval("corpus_ppl")),
        Field("median PPL", interval("median_ppl")),
        Field("mean PPL", value("mean_ppl"), 4),
        Field("P95", interval("p95_ppl")),
        Field("P99", value("p99_ppl")),
        Field("max", value("max_ppl"), 3),
        Field("MAD", value("mad_ppl"), 6),
        Field(f"PPL > {report.outlier_ppl:g}", lambda s: str(len(s.outliers))),
        Field("tail", lambda s: s.tail.verdict, 3, number=False),
    ]


def domain_grid(label: str, report: EvalReport) -> Grid:
    """Return one text's figures, a row per model: perplexity, and what parts it from the reference.

    Intervals are in the pooled tables; those here are of the means.
    """
    result = report.summaries[0].result if report.summaries else None
    how = f" ({result.protocol.n_seq} × {result.protocol.n_ctx} tokens)" if result else ""

    def against(write: Callable[[AgainstReference], str]) -> Callable[[Summary], str]:
        return lambda s: "" if s.against is None else write(s.against)

    fields = [
        Field[Summary]("model", lambda s: s.label, number=False),
        Field("corpus PPL", lambda s: with_interval(s.estimates["corpus_ppl"], ppl)),
        Field("median PPL", lambda s: ppl(s.estimates["median_ppl"].value)),
        Field("P95", lambda s: ppl(s.estimates["p95_ppl"].value), 3),
        Field(f"PPL > {report.outlier_ppl:g}", lambda s: str(len(s.outliers)), 4),
        Field("mean KLD", against(lambda a: with_interval(a.divergences["mean_kld"], kld))),
        Field("P99", against(lambda a: kld(a.quantiles.p99) if a.quantiles else ""), 2),
        Field("same top p", against(lambda a: percent(a.divergences["same_top_p"].value)), 1),
        Field("PPL(Q)/PPL(base)", against(lambda a: f"{a.ppl_ratio.value:.4f}"), 5),
    ]
    return grid_of(f"{label}{how}", fields, report.summaries).without_empty_columns()


def reference_grid(report: EvalReport) -> Grid | None:
    """Return a row per model that was scored against a reference; None if none was."""
    found = [(s, s.against) for s in report.summaries if s.against is not None]
    if not found:
        return None
    references = {against.label for _, against in found}
    one = len(references) == 1
    title = f"Against {references.pop() if one else 'the reference'} (95 % intervals)"
    fields = [f for f in _REFERENCE_FIELDS if f.heading != "reference" or not one]
    return grid_of(title, fields, found)


Against = tuple[Summary, AgainstReference]


def _kld_quantile(name: str) -> Callable[[Against], str]:
    return lambda x: kld(getattr(x[1].quantiles, name)) if x[1].quantiles else ""


def _worst_share(against: AgainstReference) -> str:
    share = against.quantiles.worst_share if against.quantiles else None
    return "" if share is None else f"{100 * share:.0f} %"


_REFERENCE_FIELDS: list[Field[Against]] = [
    Field("model", lambda x: x[0].label, number=False),
    Field("reference", lambda x: x[1].label, 3, number=False),
    Field("PPL(Q)/PPL(base)", lambda x: with_interval(x[1].ppl_ratio, lambda v: f"{v:.4f}")),
    Field("mean KLD", lambda x: with_interval(x[1].divergences["mean_kld"], kld)),
    Field(
        f"from token {FIRST_TOKENS}",
        lambda x: (
            with_interval(x[1].divergences["late_kld"], kld)
            if "late_kld" in x[1].divergences
            else ""
        ),
        1,
    ),
    Field(f"first {FIRST_TOKENS}", lambda x: kld(x[1].first.kld) if x[1].first else "", 5),
    Field("median", _kld_quantile("median"), 3),
    Field("P90", _kld_quantile("p90"), 5),
    Field("P99", _kld_quantile("p99"), 1),
    Field("max", _kld_quantile("maximum"), 4),
    Field("in worst 0.1 %", lambda x: _worst_share(x[1]), 5),
    Field("same top p", lambda x: with_interval(x[1].divergences["same_top_p"], percent)),
    Field("RMS Δp", lambda x: with_interval(x[1].divergences["rms_delta_p"], percent), 3),
    Field("mean Δp", lambda x: percent(x[1].divergences["mean_delta_p"].value), 6),
    Field("better on", lambda x: f"{x[1].sequences.n_better} of {x[1].sequences.n}", 1),
    Field("p PPL", lambda x: "" if (p := x[1].ppl_ratio.p) is None else p_value(p), 7),
    Field("p sign", lambda x: p_value(x[1].sequences.p_sign), 7),
    Field("p Wilcoxon", lambda x: p_value(x[1].sequences.p_wilcoxon), 7),
]


def llama_grid(report: EvalReport) -> Grid | None:
    """Return llama-perplexity's statistics, a column per model; None but for its protocol."""
    found = [
        (s.label, dict(s.against.llama.rows()))
        for s in report.summaries
        if s.result.protocol.name == "llama" and s.against is not None and s.against.llama
    ]
    if not found:
        return None
    columns = (Column("statistic", number=False), *(Column(label) for label, _ in found))
    names = dict.fromkeys(name for _, values in found for name in values)
    rows = tuple((name, *(values.get(name, "") for _, values in found)) for name in names)
    return Grid("As llama-perplexity prints it (± as if tokens were independent)", columns, rows)


def ranking_grid(board: Leaderboard) -> Grid:
    """Return a row per different ranking, best model first; equal models have a sign between."""
    criteria: dict[str, list[str]] = {}
    for ranking in board.rankings:
        if len(ranking.order) < min(2, len(board.rows)):
            continue
        criteria.setdefault(order(ranking), []).append(LABELS[ranking.criterion])
    fields: list[Field[tuple[str, list[str]]]] = [
        Field("ranked by", lambda x: ", ".join(x[1]), number=False),
        Field("best first", lambda x: x[0], number=False),
    ]
    return grid_of("Rankings", fields, list(criteria.items()))


def protocol_line(result: EvalResult) -> str:
    """Return how the result was measured, in one sentence."""
    p, e = result.protocol, result.engine
    drawn = f"drawn with seed {p.seed} from {p.n_windows}" if p.seed is not None else "in order"
    n = n_units(losses(result))
    unit = "article" if any(s.title for s in result.sequences) else "sequence"
    return (
        f"Protocol {p.name}: {format_count(p.n_seq, 'window')} of {p.n_ctx} tokens of "
        f"{result.text.name}, {drawn}, {format_count(p.n_scored, 'token')} scored in each, "
        f"{_before(p)}; llama.cpp {e.llama_cpp_build}{', safe kernels' if e.safe_kernels else ''}; "
        f"intervals over {format_count(n, unit)}."
    )


def _before(protocol: Protocol) -> str:
    """Return what stands before a window's text."""
    if protocol.n_warm_up > 1:
        return f"each after the {protocol.n_warm_up} tokens that start a chat"
    return "BOS" if protocol.bos or protocol.n_warm_up else "no BOS"


def statements(report: EvalReport) -> tuple[str, ...]:
    """Return what is to be said beside the tables: findings, refusals, failures, notes."""
    said = list(findings(report.board)) if report.board else []
    if report.refusal and len(report.summaries) > 1:
        said.append(f"Not ranked: {report.refusal}.")
    said += kld_sentences(report)
    said += [f"{failure}." for failure in report.failures]
    notes = dict.fromkeys(note for s in report.summaries for note in s.result.notes)
    said += [note if note.endswith(".") else f"{note}." for note in notes]
    return tuple(said)


def protocol_lines(report: EvalReport) -> tuple[str, ...]:
    """Return how the results were measured, once for each way."""
    return tuple(dict.fromkeys(protocol_line(s.result) for s in report.summaries))


def print_report(report: EvalReport, console: Console, *, where: bool = False) -> None:
    """Print the verdict, a chart, the tables, the rankings, and the findings.

    With where, also KLD by position and class of token, and the worst tokens.
    """
    for line in verdict_lines(report):
        console.print(line, soft_wrap=not console.is_terminal)
    if drawn := chart(report, min(console.width, 100) if console.is_terminal else 80):
        console.print()
        console.print("\n".join(drawn), soft_wrap=True)
    places = where_grids(report) if where else []
    for grid in (*grids(report), *places):
        console.print()
        print_grid(console, grid)
    if where and not places:
        console.print(f"\n{NO_PLACES}", soft_wrap=True)
    console.print()
    print_statements(console, (*statements(report), *protocol_lines(report)))


def grids(report: EvalReport) -> list[Grid]:
    """Return the tables: perplexity, against the reference, rankings where some differ."""
    found = [perplexity_grid(report)] if report.summaries else []
    if (against := reference_grid(report)) is not None:
        found.append(against)
    if report.board and len(report.board.rows) > 1:
        found.append(ranking_grid(report.board))
    if (llama := llama_grid(report)) is not None:
        found.append(llama)
    return [grid.without_empty_columns() for grid in found if grid.rows]


def report_markdown(report: EvalReport, *, where: bool = False) -> str:
    """Return the verdict, tables and findings as markdown, ready for a model card."""
    verdict = "".join(f"{markdown_text(line)}\n\n" for line in verdict_lines(report)).rstrip("\n")
    shown = [*grids(report), *(where_grids(report) if where else ())]
    tables = [f"**{grid.title}**\n\n{to_markdown(grid)}" for grid in shown if grid.rows]
    items = "".join(
        f"- {markdown_text(s)}\n" for s in (*statements(report), *protocol_lines(report))
    )
    return "\n".join(filter(None, ("### Evaluation\n", verdict and f"{verdict}\n", *tables, items)))


def report_csv(*reports: EvalReport) -> str:
    """Return a row per model with every statistic in full precision; an absent one is empty."""
    rows = [dict(_flat(s)) for report in reports for s in report.summaries]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows
    )
    return out.getvalue()


def report_json(report: EvalReport) -> dict[str, object]:
    """Return statistics, rankings and findings as JSON values; NaN and infinity become null."""
    rankings = report.board.rankings if report.board else ()
    return {
        "models": [{**dict(_flat(s)), **_llama(s)} for s in report.summaries],
        "verdict": list(verdict_lines(report)),
        "rankings": {r.criterion: list(r.order) for r in rankings},
        "orders": {r.criterion: order(r) for r in rankings},
        "where": where_json(report),
        "statements": list(statements(report)),
        "protocols": list(protocol_lines(report)),
    }


def _llama(s: Summary) -> dict[str, object]:
    if s.against is None or s.against.llama is None:
        return {}
    return {"llama_perplexity": s.against.llama.model_dump()}


Cell = str | int | float | bool | None


def _flat(s: Summary) -> Iterator[tuple[str, Cell]]:
    """Yield the summary's values by name, each interval as NAME_low and NAME_high."""
    r = s.result
    yield from (
        ("model", s.label),
        ("path", r.model.path),
        ("n_bytes", r.model.n_bytes),
        ("bpw", r.model.bpw),
        ("is_reference", s.is_reference),
        ("n_sequences", len(r.sequences)),
        ("n_sequences_wanted", r.protocol.n_seq),
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
        ("text", r.text.name),
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
    yield "p_ppl_ratio", against.ppl_ratio.p
    s = against.sequences
    yield "n_better", s.n_better
    yield "n_worse", s.n_worse
    yield from _estimate("share_better", s.share)
    yield from _estimate("median_delta_nll", s.median_delta)
    yield "p_sign", s.p_sign
    yield "p_wilcoxon", s.p_wilcoxon
    for name, found in against.divergences.items():
        yield from _estimate(name, found)
    if first := against.first:
        yield "first_kld", first.kld
        yield "first_share_of_kld", first.share_of_kld
    if q := against.quantiles:
        yield from (
            ("median_kld", q.median),
            ("p90_kld", q.p90),
            ("p99_kld", q.p99),
            ("p999_kld", q.p999),
            ("max_kld", q.maximum),
            ("worst_share_of_kld", q.worst_share),
        )


def _estimate(name: str, found: Estimate) -> Iterator[tuple[str, Cell]]:
    yield name, _finite(found.value)
    yield f"{name}_low", found.low
    yield f"{name}_high", found.high


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
