"""What benches share that compare files on the same held-out windows: rows, and ratios of KLDs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from provenance import provenance
from ramgguf.core.mix import Part
from ramgguf.evaluate import score_held_out
from ramgguf.evaluate.held_out import resamples

Row = dict[str, Any]


def scored(
    files: Sequence[tuple[Row, Path]],
    source: Path,
    *,
    n_ctx: int,
    rounds: int,
    logits: Path,
    part: Part = "gate",
) -> list[Row]:
    """Return each file's row with the KLD to the source of every window of a part of the mix.

    logits keeps what the source says of these windows, for the next call.
    """
    scores = score_held_out(
        [path for _, path in files], source, part=part, n_ctx=n_ctx, max_rounds=rounds,
        seconds=None, reference_logits=logits,
    )  # fmt: skip
    return [
        {
            **row,
            "n_ctx": n_ctx,
            "domains": [w.domain for w in score.windows],
            "kld": [round(w.kld_sum / w.n_tokens, 6) for w in score.windows],
            **provenance(),
        }
        for (row, _), score in zip(files, scores, strict=True)
    ]


def add_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add the rows to a file of results."""
    with path.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path, *keys: str) -> list[Row]:
    """Return the rows of a file of results, the latest of those that are alike in keys."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({tuple(str(row[k]) for k in keys): row for row in rows}.values())


def kld_ratio(
    mine: Sequence[float], theirs: Sequence[float], domains: Sequence[str]
) -> tuple[float, float, float]:
    """Return the ratio of the mean KLDs, and its 95 % interval by bootstrap over windows, paired
    within domains.
    """
    a, b = np.array(mine), np.array(theirs)
    counts = resamples(domains)
    low, high = np.quantile(counts @ a / (counts @ b), (0.025, 0.975))
    return float(a.mean() / b.mean()), float(low), float(high)


def domain_ratios(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratio of two rows' mean KLDs within each domain."""
    domains = mine["domains"]
    if domains != theirs["domains"]:
        raise ValueError("the files were scored on other windows")
    a, b = np.array(mine["kld"]), np.array(theirs["kld"])
    within = {domain: np.array([d == domain for d in domains]) for domain in domains}
    return {domain: float(a[at].mean() / b[at].mean()) for domain, at in within.items()}


def ratio(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the ratio of two rows' mean KLDs, its interval, and the ratio within each domain."""
    each = ", ".join(f"{domain} {r:.2f}" for domain, r in domain_ratios(mine, theirs).items())
    value, low, high = kld_ratio(mine["kld"], theirs["kld"], mine["domains"])
    return f"{value:.3f} ({low:.3f}–{high:.3f}) [{each}]"
