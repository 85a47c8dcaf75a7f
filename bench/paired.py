"""What benches share that compare files on the same held-out windows: rows, and ratios of KLDs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from provenance import provenance
from ramgguf.evaluate import score_held_out
from ramgguf.evaluate.held_out import resamples

Row = dict[str, Any]


def scored(
    files: Sequence[tuple[Row, Path]], source: Path, *, n_ctx: int, rounds: int, logits: Path
) -> list[Row]:
    """Return each file's row with the KLD to the source of every window of the `gate` part.

    logits keeps what the source says of these windows, for the next call.
    """
    scores = score_held_out(
        [path for _, path in files], source, part="gate", n_ctx=n_ctx, max_rounds=rounds,
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


def ratio(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the ratio of the mean KLDs, its 95 % interval by bootstrap over windows, paired within
    domains, and the ratio within each domain.
    """
    domains = mine["domains"]
    if domains != theirs["domains"]:
        raise ValueError("the files were scored on other windows")
    a, b = np.array(mine["kld"]), np.array(theirs["kld"])
    counts = resamples(domains)
    low, high = np.quantile(counts @ a / (counts @ b), (0.025, 0.975))
    each = []
    for domain in dict.fromkeys(domains):
        at = [i for i, d in enumerate(domains) if d == domain]
        each.append(f"{domain} {a[at].mean() / b[at].mean():.2f}")
    return f"{a.mean() / b.mean():.3f} ({low:.3f}–{high:.3f}) [{', '.join(each)}]"
