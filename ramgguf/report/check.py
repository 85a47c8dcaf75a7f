"""Deployment tests for the terminal and as Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from ramgguf.core.units import format_bytes, format_count, format_seconds
from ramgguf.deploy.result import CheckResult, Spread
from ramgguf.report.grid import Field, Grid, grid_of, to_markdown, to_rich


@dataclass(frozen=True)
class Line:
    """A row of the table: what, its value, its spread and the number of repeats."""

    what: str
    value: str
    spread: str = ""
    n: str = ""


def lines(result: CheckResult) -> Iterator[Line]:
    """Yield what was measured, a row each."""
    use = result.planned
    yield Line("file", format_bytes(result.n_bytes))
    parts = f"weights {format_bytes(use.weights)}, cache {format_bytes(use.cache)}, "
    parts += f"compute {format_bytes(use.compute)}, overhead {format_bytes(use.overhead)}"
    yield Line(f"memory planned ({result.planned_by})", format_bytes(use.total), parts)
    if result.peak_bytes is not None:
        yield Line("memory at its peak, context filled", format_bytes(result.peak_bytes))
    if result.margin is not None:
        yield Line("margin", format_bytes(result.margin), f"{result.margin / result.limit:.1%}")
    if result.load_seconds is not None:
        yield Line("load time", format_seconds(result.load_seconds))
    if (speed := result.speed) is not None:
        yield _spread(f"prompt of {speed.n_prompt} tokens, tokens/s", speed.prompt)
        if speed.generation is not None:
            yield _spread("generation, tokens/s", speed.generation)
        if speed.first_token_seconds is not None:
            yield _spread("time to first token, s", speed.first_token_seconds, digits=2)
        yield Line(f"filling {result.n_ctx} tokens, tokens/s", f"{speed.filling:.1f}", n="1")
        if speed.generation_full is not None:
            yield Line("generation, context full, tokens/s", f"{speed.generation_full:.1f}", n="1")
    if result.known_ppl is not None:
        yield Line("perplexity of a plain paragraph", f"{result.known_ppl:,.1f}")
    if result.answers:
        n_wrecks = sum(bool(a.signs) for a in result.answers)
        yield Line("answers with signs of collapse", f"{n_wrecks} of {len(result.answers)}")
    surprises = [a.surprise for a in result.answers if a.surprise is not None]
    if surprises:
        mean = sum(surprises) / len(surprises)
        yield Line("answers less likely to the reference, nats/token", f"{mean:.2f}")


def check_grid(result: CheckResult) -> Grid:
    """Return the rows as a table."""
    fields: list[Field[Line]] = [
        Field("", lambda line: line.what, number=False),
        Field("median", lambda line: line.value),
        Field("low–high", lambda line: line.spread, number=False),
        Field("n", lambda line: line.n),
    ]
    return grid_of("", fields, lines(result))


def _spread(what: str, spread: Spread, digits: int = 1) -> Line:
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    return Line(what, f"{spread.median:.{digits}f}", f"{low}–{high}", str(spread.n))


def verdict(result: CheckResult) -> str:
    """Return pass or fail, in one sentence."""
    where = f"{format_bytes(result.limit)} ({result.limit_source}) at {result.n_ctx} tokens"
    if result.passed:
        margin = format_bytes(result.margin or 0)
        what = " (an embedding model)" if result.model_kind == "embedding" else ""
        return f"PASS: {result.path}{what} runs in {where}, {margin} to spare"
    return f"FAIL: {result.path} in {where}: {'; '.join(result.failures)}"


def conditions(result: CheckResult) -> str:
    """Return where and how the test was run."""
    cpu = f"{result.system.cpu}, llama.cpp {result.system.build}, " if result.system else ""
    cache = f"cache {result.type_k}/{result.type_v}"
    return (
        f"{cpu}{format_count(result.n_threads, 'thread')}, {cache}; limit by {result.limit_method}"
    )


def print_check(result: CheckResult, console: Console, *, verbose: bool = False) -> None:
    """Print the table, the answers if asked for, the verdict and what to change."""
    console.print(to_rich(check_grid(result), header_style="bold"))
    console.print(conditions(result), soft_wrap=True)
    for answer in result.answers if verbose or not result.passed else ():
        signs = f"  ({'; '.join(answer.signs)})" if answer.signs else ""
        console.print(f"  {answer.prompt!r}{signs}", soft_wrap=True)
        console.print(f"    {answer.text[:200]!r}", soft_wrap=True)
    console.print(verdict(result), soft_wrap=True)
    for change in result.advice:
        console.print(f"  change: {change}", soft_wrap=True)


@dataclass(frozen=True)
class Ratio:
    """A figure of one file over another's."""

    what: str
    value: float


def ratios(result: CheckResult, other: CheckResult) -> list[Ratio]:
    """Return the first file's figures over the second's, as far as both were measured."""
    pairs: list[tuple[str, float | None, float | None]] = [
        ("file", result.n_bytes, other.n_bytes),
        ("peak memory", result.peak_bytes, other.peak_bytes),
        ("load time", result.load_seconds, other.load_seconds),
    ]
    if result.speed is not None and other.speed is not None:
        a, b = result.speed, other.speed
        pairs += [
            ("prompt tokens/s", a.prompt.median, b.prompt.median),
            ("generation tokens/s", _median(a.generation), _median(b.generation)),
            ("time to first token", _median(a.first_token_seconds), _median(b.first_token_seconds)),
            ("generation tokens/s, context full", a.generation_full, b.generation_full),
        ]
    return [Ratio(what, x / y) for what, x, y in pairs if x is not None and y]


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def print_ratios(result: CheckResult, other: CheckResult, console: Console) -> None:
    """Print how the first file compares with the second."""
    console.print(f"{result.path} / {other.path}:", soft_wrap=True)
    for ratio in ratios(result, other):
        console.print(f"  {ratio.what}: {ratio.value:.2f} ×")


def markdown(results: Sequence[CheckResult]) -> str:
    """Return the tests as Markdown: a table and a verdict each, and the ratios of two."""
    parts = []
    for result in results:
        parts += [
            f"### {result.path}",
            to_markdown(check_grid(result)).rstrip(),
            f"**{verdict(result)}.** {conditions(result)}.",
        ]
        if result.advice:
            parts.append("\n".join(f"- {change}" for change in result.advice))
    if len(results) == 2:
        first, second = results
        fields: list[Field[Ratio]] = [
            Field(f"{first.path} / {second.path}", lambda r: r.what, number=False),
            Field("ratio", lambda r: f"{r.value:.2f} ×"),
        ]
        parts.append(to_markdown(grid_of("", fields, ratios(first, second))).rstrip())
    return "\n\n".join(parts) + "\n"
