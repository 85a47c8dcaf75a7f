"""What a file loses on held-out text, as quantize ends: every figure with its interval."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from ramgguf.evaluate.held_out import HeldOutScore, WindowScore
from ramgguf.report.held_out import held_out_grid, print_held_out, summary

DOMAINS = ("prose", "code", "mathematics", "chat", "languages")


def _score(n_rounds: int) -> HeldOutScore:
    rng = np.random.default_rng(0)
    return HeldOutScore(
        ramgguf_version="0",
        model="a",
        n_bytes=1,
        reference="b",
        part="score",
        n_ctx=256,
        first_target=8,
        engine="e",
        windows=tuple(
            WindowScore(
                domain=domain,
                n_tokens=100,
                kld_sum=float(rng.lognormal(1.0, 0.3)),
                nll_sum=310.0 + float(rng.normal()),
                reference_nll_sum=300.0,
                n_same_top=int(rng.integers(85, 95)),
            )
            for _ in range(n_rounds)
            for domain in DOMAINS
        ),
        seconds=9.0,
    )


def test_every_domain_and_all_have_three_figures_with_intervals() -> None:
    grid = held_out_grid(_score(12))
    assert [row[0] for row in grid.rows] == [*DOMAINS, "all"]
    for row in grid.rows:
        for cell in row[2:]:
            value, _, interval = cell.partition(" (")
            low, _, high = interval.rstrip(")").partition("–")
            ends = [float(x.rstrip("%")) for x in (low, value, high)]
            assert ends == sorted(ends)
            assert ends[0] < ends[2]


def test_few_windows_claim_no_interval() -> None:
    rows = held_out_grid(_score(1)).rows
    assert all("(" not in cell for row in rows[:-1] for cell in row[2:])


def test_the_summary_has_the_intervals_of_the_table() -> None:
    score = _score(12)
    found = summary(score)
    assert list(found) == ["all", *DOMAINS]
    for name, figures in found.items():
        own = score.overall() if name == "all" else score.of(name)
        assert isinstance(figures, dict)
        for key in ("kld", "ppl_ratio", "same_top"):
            estimate = getattr(own, key)
            assert figures[key] == estimate.value
            assert (figures[f"{key}_low"], figures[f"{key}_high"]) == (estimate.low, estimate.high)
            assert figures[f"{key}_low"] <= figures[key] <= figures[f"{key}_high"]
    n, nll = 12 * 100, sum(w.nll_sum - w.reference_nll_sum for w in score.windows) / 5
    assert score.overall().ppl_ratio.value == pytest.approx(math.exp(nll / n))


def test_the_line_below_says_what_was_measured_and_what_intervals_are() -> None:
    out = io.StringIO()
    print_held_out(_score(12), Console(file=out, width=200))
    assert "60 windows of 256 tokens that nothing else used, from token 8 on" in out.getvalue()
    assert "intervals: 95 %, by bootstrap over windows" in out.getvalue()
