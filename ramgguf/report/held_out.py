"""What a file loses on held-out text, by domain, for the terminal."""

from rich.console import Console

from ramgguf.core.units import format_seconds
from ramgguf.evaluate.held_out import DomainScore, HeldOutScore
from ramgguf.report.grid import Field, Grid, grid_of, to_rich
from ramgguf.report.numbers import kld, with_interval


def held_out_grid(score: HeldOutScore) -> Grid:
    """Return a row per domain and one for all: tokens, KLD, PPL ratio and same top p."""
    fields: list[Field[tuple[str, DomainScore]]] = [
        Field("held-out text", lambda x: x[0], number=False),
        Field("tokens", lambda x: f"{x[1].n_tokens:,}"),
        Field("KLD, nats", lambda x: with_interval(x[1].kld, kld)),
        Field("PPL ×", lambda x: with_interval(x[1].ppl_ratio, lambda v: f"{v:.3f}")),
        Field("same top", lambda x: with_interval(x[1].same_top, lambda v: f"{v:.1%}")),
    ]
    domains = [(domain, score.of(domain)) for domain in score.domains]
    return grid_of("", fields, [*domains, ("all", score.overall())])


def print_held_out(score: HeldOutScore, console: Console) -> None:
    """Print what was measured, on what, and what its intervals are."""
    console.print(to_rich(held_out_grid(score), header_style="bold"))
    console.print(
        f"measured against the source on {len(score.windows)} windows of {score.n_ctx} tokens that "
        f"nothing else used, from token {score.first_target} on, in "
        f"{format_seconds(score.seconds)}; intervals: 95 %, by bootstrap over windows",
        soft_wrap=True,
    )


def summary(score: HeldOutScore) -> dict[str, object]:
    """Return what --json prints: figures of all windows and of each domain."""
    parts = {"all": score.overall(), **{d: score.of(d) for d in score.domains}}
    return {
        name: {
            "n_tokens": found.n_tokens,
            "kld": found.kld.value,
            "kld_low": found.kld.low,
            "kld_high": found.kld.high,
            "ppl_ratio": found.ppl_ratio.value,
            "same_top": found.same_top.value,
        }
        for name, found in parts.items()
    }
