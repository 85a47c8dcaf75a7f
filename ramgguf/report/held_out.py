"""What a file loses on held-out text, by domain, for the terminal."""

from rich.console import Console

from ramgguf.core.units import format_count, format_seconds
from ramgguf.evaluate.draft_agreement import DraftAgreement
from ramgguf.evaluate.held_out import DomainScore, HeldOutScore
from ramgguf.report.grid import Field, Grid, grid_of, to_rich
from ramgguf.report.numbers import estimate_json, kld, with_interval


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
        f"measured against the source on {format_count(len(score.windows), 'window')} of "
        f"{score.n_ctx} tokens that nothing else used, from token {score.first_target} on, in "
        f"{format_seconds(score.seconds)}; intervals: 95 %, by bootstrap over windows",
        soft_wrap=True,
    )


def print_draft(found: DraftAgreement, console: Console) -> None:
    """Print how often the draft model proposes what the source and the file say."""

    def share(value: float) -> str:
        return f"{value:.1%}"

    change = with_interval(found.change, lambda v: f"{100 * v:+.1f}")
    console.print(
        f"draft model {found.draft}: its most probable token is the source's at "
        f"{with_interval(found.source, share)} of {found.n_tokens:,} tokens of held-out text, this "
        f"file's at {with_interval(found.quantized, share)}, a change of {change} points",
        soft_wrap=True,
    )
    if found.is_worse:
        console.print(
            "warning: fewer drafts are accepted than with the source, so that speculative decoding "
            "gains less; the text is the same as without it",
            soft_wrap=True,
        )


def draft_summary(found: DraftAgreement) -> dict[str, object]:
    """Return what --json prints: shares of equal tokens, and their difference, with intervals."""
    shares = {"source": found.source, "quantized": found.quantized, "change": found.change}
    return {
        "draft": found.draft,
        "n_tokens": found.n_tokens,
        **{name: estimate_json(e) for name, e in shares.items()},
    }


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
            "ppl_ratio_low": found.ppl_ratio.low,
            "ppl_ratio_high": found.ppl_ratio.high,
            "same_top": found.same_top.value,
            "same_top_low": found.same_top.low,
            "same_top_high": found.same_top.high,
        }
        for name, found in parts.items()
    }
