"""Tables of published figures, as people paste them from articles and spreadsheets."""

import csv
import re
from collections.abc import Mapping, Sequence

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
    articles print it: exp of the mean NLL over all tokens. A comma stands before a
    fraction or between thousands, as the column's numbers say, else the table's. Raises ResultError
    for other text, and for a number that may be either.
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
    numbers = _Numbers(rows, columns)
    notes += numbers.notes
    aggregates = [_aggregate(row, rows[0], columns, numbers, name) for row in rows[1:]]
    return tuple(aggregates), tuple(notes)


def _rows(text: str, name: str) -> list[list[str]]:
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
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
    row: Sequence[str],
    header: Sequence[str],
    columns: dict[str, int],
    numbers: "_Numbers",
    name: str,
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
            value = float(numbers.plain(key, said, f"{name}: {key} of {label}"))
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ResultError(f"{name}: {key} of {label} is {said!r}, expected a number ≥ 0")
        return value

    outliers = number("n_outliers")
    return Aggregate(
        label=f"{family} {label}".strip(),
        n_bytes=_size(cell("n_bytes"), header[columns.get("n_bytes", 0)], label, numbers, name),
        corpus_ppl=number("corpus_ppl"),
        mean_ppl=number("mean_ppl"),
        median_ppl=number("median_ppl"),
        mean_kld=number("mean_kld"),
        n_outliers=None if outliers is None else int(outliers),
    )


# A number with a point before its fraction, and one with a comma. Both know thousands in groups.
_POINT = re.compile(r"\d+(\.\d*)?|\.\d+|[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_COMMA = re.compile(r"\d+(,\d*)?|,\d+|[1-9]\d{0,2}(\.\d{3})+(,\d*)?")
_LEADING = re.compile(r"[\d.,]*\d[.,]?")
_WHOLE = re.compile(r"(\b|_)([KM]i?B|bytes?)\b", re.IGNORECASE)  # no one gives thousandths of these


class _Numbers:
    """How the numbers of a table are written: with decimal points, or with decimal commas.

    A column's own numbers say it, else those of the other columns. notes say what was assumed.
    """

    def __init__(self, rows: Sequence[Sequence[str]], columns: Mapping[str, int]) -> None:
        self.notes: list[str] = []
        # The sign before a fraction, by column; None where each number is read by itself.
        self._decimal: dict[str, str | None] = {}
        undecided: dict[str, list[str]] = {}
        seen: set[str] = set()
        for key, i in columns.items():
            cells = [row[i].strip() for row in rows[1:] if i < len(row)]
            numbers = [m[0] for cell in cells if (m := _LEADING.match(cell))]
            found = {sign for n in numbers if (sign := _decimal_of(n))}
            if key in ("label", "family"):
                continue
            seen |= found
            if found:
                self._decimal[key] = found.pop() if len(found) == 1 else None
            else:
                undecided[key] = [rows[0][i], *cells]
        for key, (heading, *cells) in undecided.items():
            self._decimal[key] = self._assumed(heading, cells, seen)

    def _assumed(self, heading: str, cells: Sequence[str], others: set[str]) -> str | None:
        """Return the decimal sign of a column in which every sign may be either."""
        signs = {
            sign for cell in cells if (m := _LEADING.match(cell)) for sign in ",." if sign in m[0]
        }
        is_whole = any(_WHOLE.search(text) for text in (heading, *cells))
        if "," not in signs:
            if others != {","} or not signs:
                return "."
            return "," if is_whole else None
        if is_whole and "." not in signs:
            return "."
        if others == {",", "."} or (others == {","} and "." in signs):
            return None
        decimal = "." if "." in signs else next(iter(others), ",")
        said = next(cell for cell in cells if "," in cell)
        if others != {","}:
            read = said.replace(",", "" if decimal == "." else ".")
            self.notes.append(f"{heading.strip()!r}: {said} is read as {read}")
        return decimal

    def plain(self, key: str, said: str, what: str) -> str:
        """Return a number of a column, and what follows it, as Python writes it.

        what names the number. Raises ResultError where the table leaves open which one it is.
        """
        leading = _LEADING.match(said)
        if leading is None:
            return said
        number, rest = leading[0], said[leading.end() :]
        decimal = self._decimal[key]
        is_point, is_comma = _POINT.fullmatch(number), _COMMA.fullmatch(number)
        if decimal is None and is_point and is_comma and not number.isdigit():
            raise ResultError(
                f"{what} is {said!r}, and other numbers of the table have both signs, or another "
                "one, before their fraction: write all with a decimal point"
            )
        if is_point and (decimal != "," or not is_comma):
            return number.replace(",", "") + rest
        if is_comma:
            return number.replace(".", "").replace(",", ".") + rest
        return said


def _decimal_of(number: str) -> str | None:
    """Return the sign before the fraction, "." or ","; None where it may be either, or neither."""
    is_point, is_comma = _POINT.fullmatch(number), _COMMA.fullmatch(number)
    if bool(is_point) == bool(is_comma):
        return None
    return "." if is_point else ","


def _size(said: str, heading: str, label: str, numbers: "_Numbers", name: str) -> int | None:
    if said.lower() in _UNKNOWN:
        return None
    text = numbers.plain("n_bytes", said.replace(" ", ""), f"{name}: the size of {label}")
    unit = re.search(r"(?:\b|_)([KMGT])(i?)B\b", heading, re.IGNORECASE)
    if unit and re.fullmatch(r"[\d.]+", text):
        text += f"{unit[1].upper()}{unit[2].lower()}B"
    try:
        return int(float(text)) if re.fullmatch(r"[\d.e+]+", text) else parse_size(text)
    except (ValueError, OverflowError, RamggufError):
        raise ResultError(
            f"{name}: the size of {label} is {said!r}, expected bytes or 16 GB"
        ) from None
