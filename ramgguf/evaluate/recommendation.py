"""Which file of a comparison to take, and what its figures do not support."""

from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.evaluate.leaderboard import SIGNIFICANCE, Leaderboard, Pair, Row, Verdict


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The file to take, and the next best that it was compared with (None: there is none).

    by is the criterion that decides: KLD where all files have it, else the median, else corpus PPL.
    Where mean KLD and KLD without the first tokens prefer different files, it is the latter.
    resolved: paired tests tell the two apart. smaller are files that no smaller one beats.
    take is None where published means and medians prefer different files: preferred has them.
    """

    take: str | None
    rival: str | None
    by: str
    pair: Pair | None
    resolved: bool
    smaller: tuple[str, ...] = ()
    preferred: tuple[tuple[str, str], ...] = ()

    @property
    def agree(self) -> bool | None:
        """Whether the mean and most sequences prefer one file; None where that is unknown."""
        if self.pair is None or "corpus_ppl" not in self.pair.ratios:
            return None
        s = self.pair.sequences
        return (self.pair.ratios["corpus_ppl"].value - 1) * (s.n_worse - s.n_better) >= 0


def recommend(board: Leaderboard) -> Recommendation | None:
    """Return which file to take; None where no criterion is known of all files."""
    files = [r for r in board.rows if not r.is_reference] or list(board.rows)
    known = [c for c in ("mean_kld", "median_ppl", "corpus_ppl") if _all_have(files, c)]
    if not known:
        return None
    by = known[0]
    if by == "mean_kld" and parted_by_first_tokens(files):
        by = "late_kld"
    ranked = sorted(files, key=lambda r: (r.estimates[by].value, r.n_bytes or 0))
    if len(files) == 1:
        reference = next((r.label for r in board.rows if r.label != files[0].label), None)
        pair = board.pair(files[0].label, reference) if reference else None
        return Recommendation(files[0].label, reference, by, pair, told_apart(pair, by))
    if not board.pairs:
        best = tuple((c, min(files, key=lambda r: r.estimates[c].value).label) for c in known)
        if len({label for _, label in best}) > 1:
            return Recommendation(None, None, by, None, resolved=False, preferred=best)
    take = _smallest_equal(board, ranked, by)
    rival = next(r for r in ranked if r is not take)
    pair = board.pair(take.label, rival.label)
    smaller = tuple(
        r.label
        for r in ranked
        if r is not take and (r.n_bytes or 0) < (take.n_bytes or 0) and _on_front(r, files, by)
    )
    return Recommendation(take.label, rival.label, by, pair, told_apart(pair, by), smaller=smaller)


def told_apart(pair: Pair | None, by: str) -> bool:
    """Return whether the pair's tests tell its models apart by this criterion.

    For the median, the sign test counts as well: it is paired, and so sharper.
    """
    if pair is None:
        return False
    p = pair.ratios[by].p if by in pair.ratios else None
    found = [p] if p is not None else []
    if by == "median_ppl":
        found.append(pair.sequences.p_sign)
    return any(x < SIGNIFICANCE for x in found)


def parted_by_first_tokens(files: Sequence[Row]) -> bool:
    """Return whether mean KLD prefers another file than KLD without the windows' first tokens."""
    if not _all_have(files, "mean_kld") or not _all_have(files, "late_kld"):
        return False
    best = [min(files, key=lambda r: r.estimates[c].value) for c in ("mean_kld", "late_kld")]
    return best[0] is not best[1]


def carried_criteria(board: Leaderboard) -> tuple[str, ...]:
    """Return the means that few sequences carry against most of the others."""
    found = {
        c
        for d in board.disagreements
        if any(r.verdict is Verdict.FEW for r in d.reversals)
        for c in (d.first.criterion, d.second.criterion)
    }
    return tuple(c for c in ("corpus_ppl", "mean_ppl") if c in found)


def _all_have(rows: Sequence[Row], criterion: str) -> bool:
    return bool(rows) and all(criterion in r.estimates for r in rows)


def _smallest_equal(board: Leaderboard, ranked: list[Row], by: str) -> Row:
    """Return the best file, or the smallest of those that the tests do not tell from it."""
    best = ranked[0]
    if not board.pairs or any(r.n_bytes is None for r in ranked):
        return best
    alike = [r for r in ranked[1:] if not told_apart(board.pair(best.label, r.label), by)]
    return min([best, *alike], key=lambda r: r.n_bytes or 0)


def _on_front(row: Row, rows: list[Row], by: str) -> bool:
    value, size = row.estimates[by].value, row.n_bytes or 0
    return not any(
        r is not row and (r.n_bytes or 0) <= size and r.estimates[by].value < value for r in rows
    )
