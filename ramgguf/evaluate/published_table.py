"""Tables of published figures, as people paste them from articles and spreadsheets."""

import csv
import re
from collections.abc import Sequence

from ramgguf.core.errors import RamggufError, ResultError
from ramgguf.core.units import format_count, parse_size
from ramgguf.evaluate.leaderboard import Aggregate

TABLE_SUFFIXES = (".csv", ".tsv", ".md", ".txt")

# What a header may say, without case, punctuation and what stands in parentheses.
_NAMES = {
    "label": ("model", "condition", "name", "variant", "file", "quant", "quantization", "method"),
    "family": ("family", "base", "basemodel", "modelfamily"),
    "n_bytes": ("nbytes", "size", "bytes", "filesize", "sizegb", "gb"),
    "corpus_ppl": ("corpusppl", "corpusperplexity", "ppl", "perplexity"),
    "mean": ("mean", "meanppl", "meanperplexity", "averageppl", "avgppl", "pplmean"),
    "mean_ppl": ("arithmeticmeanppl", "sequencemeanppl"),
    "median_ppl": ("median", "medianppl", "pplmedian", "medianperplexity"),
    "mean_kld": ("kld", "meankld", "kldmean", "avgkld", "averagekld", "kldivergence", "kl"),
    "n_outliers": ("noutliers", "outliers", "outliersequences"),
}
_COLUMNS = "model, n_bytes, corpus_ppl, mean_ppl, median_ppl, mean_kld, n_outliers"
_OWN = {"mean_ppl"}  # the product's own column: an arithmetic mean, as it writes it
_UNKNOWN = ("", "-", "–", "—", "n/a", "na", "?")


def published_table(text: str, *, name: str) -> tuple[tuple[Aggregate, ...], tuple[str, ...]]:
    """Return a row's figures per model, and notes on how the table was read.

    Columns are separated by commas, semicolons, tabs or pipes. "Mean" is the corpus PPL, as
    articles print it: exp of the mean NLL over all tokens. Raises ResultError for other text.
    """
    rows = _rows(text.removeprefix("\ufeff"), name)
    columns, ignored = _columns(rows[0]) if rows else ({}, [])
    if "label" not in columns:
        raise ResultError(f"{name} has no column 'model'; expected a header with {_COLUMNS}")
    if len(columns) - ("family" in columns) < 2 or len(rows) < 2:
        raise ResultError(f"{name} has no figures; expected a header with {_COLUMNS} and rows")
    notes = [f"columns that are not understood: {', '.join(ignored)}"] if ignored else []
    if "mean" in columns:
        notes.append(
            f"{rows[0][columns['mean']].strip()!r} is taken as corpus PPL: articles print exp of"
            " the mean NLL over tokens under this name"
        )
        columns["corpus_ppl"] = columns.pop("mean")
    aggregates = [_aggregate(row, rows[0], columns, name) for row in rows[1:]]
    return tuple(aggregates), tuple(notes)


def _rows(text: str, name: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    mark = max("|\t;,", key=lambda c: (lines[0].count(c) > 0, -"|\t;,".index(c)))
    if mark == "|":
        cells = [[c.strip(" *`") for c in line.strip().strip("|").split("|")] for line in lines]
        return [row for row in cells if not all(re.fullmatch(r":?-+:?", c) for c in row)]
    try:
        return list(csv.reader(lines, delimiter=mark))
    except csv.Error as e:
        raise ResultError(f"{name} is no table ({e})") from None


def _columns(header: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return the place of each known column, and the headers that are not understood."""
    places: dict[str, int] = {}
    ignored = []
    plain = [re.sub(r"[\W_]", "", re.sub(r"\(.*?\)", "", h).lower()) for h in header]
    for i, (heading, word) in enumerate(zip(header, plain, strict=True)):
        found = next((key for key, words in _NAMES.items() if word in words), None)
        if heading.strip().lower() in _OWN:
            found = heading.strip().lower()
        # "Model" beside "Condition" names the family
        if found == "label" and "label" in places and "family" not in places:
            if plain[places["label"]] == "model":
                places["family"], places["label"] = places["label"], i
            elif word == "model":
                places["family"] = i
            else:
                ignored.append(heading.strip())
        elif found is None or found in places or (found == "mean" and "corpus_ppl" in places):
            ignored.append(heading.strip() or f"column {i + 1}")
        elif found == "corpus_ppl" and "mean" in places:
            ignored.append(header[places.pop("mean")].strip())
            places[found] = i
        else:
            places[found] = i
    return places, ignored


def _aggregate(
    row: Sequence[str], header: Sequence[str], columns: dict[str, int], name: str
) -> Aggregate:
    def cell(key: str) -> str:
        i = columns.get(key)
        return row[i].strip() if i is not None and i < len(row) else ""

    label, family = cell("label"), cell("family")
    if not label:
        raise ResultError(f"{name}: a row has no name in column {header[columns['label']]!r}")
    if len(row) > len(header):
        raise ResultError(
            f"{name}: the row of {label} has {format_count(len(row), 'cell')} of {len(header)}"
        )

    def number(key: str) -> float | None:
        said = cell(key)
        if said.lower() in _UNKNOWN:
            return None
        try:
            value = float(_decimal(said))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ResultError(f"{name}: {key} of {label} is {said!r}, expected a number ≥ 0")
        return value

    outliers = number("n_outliers")
    return Aggregate(
        label=f"{family} {label}".strip(),
        n_bytes=_size(cell("n_bytes"), header[columns.get("n_bytes", 0)], label, name),
        corpus_ppl=number("corpus_ppl"),
        mean_ppl=number("mean_ppl"),
        median_ppl=number("median_ppl"),
        mean_kld=number("mean_kld"),
        n_outliers=None if outliers is None else int(outliers),
    )


def _decimal(said: str) -> str:
    """Return a number as Python reads it: 1,234.5 and 8,706 (a comma for the point) too."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", said) and ("." in said or said.count(",") > 1):
        return said.replace(",", "")
    return said.replace(",", ".") if said.count(",") == 1 and "." not in said else said


def _size(said: str, heading: str, label: str, name: str) -> int | None:
    if said.lower() in _UNKNOWN:
        return None
    text = _decimal(said.replace(" ", ""))
    if re.search(r"\bGi?B\b|_gb$", heading, re.IGNORECASE) and re.fullmatch(r"[\d.]+", text):
        text += "GiB" if "gib" in heading.lower() else "GB"
    try:
        return int(float(text)) if re.fullmatch(r"[\d.e+]+", text) else parse_size(text)
    except (ValueError, OverflowError, RamggufError):
        raise ResultError(
            f"{name}: the size of {label} is {said!r}, expected bytes or 16 GB"
        ) from None
