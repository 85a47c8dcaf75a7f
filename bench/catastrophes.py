"""Does quantization calm text that breaks the original? Per sequence, with noise as the control.

    python bench/catastrophes.py models/smol135-f16.gguf --budgets 30%,40%

Makes sequences that a model may handle catastrophically: repeated and shuffled text, letters of
other scripts, text that looks like binary data, beside ordinary text. Scores the source, files
that `rtn` quantizes by plans at the budgets, and the source with Gaussian noise as large as each
plan's errors (`perturb`). Kinds are chosen beforehand, not by how the source does on them: what
is chosen for the source's loss gets better by regression alone. The first 8 tokens of a sequence
are read and not scored. Appends a line per file, with all its sequences, to
bench/results/catastrophes.jsonl.
"""

import argparse
import base64
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.core.corpus import default_corpus
from ramgguf.core.mix import by_domain
from ramgguf.evaluate.significance import sign_p
from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import TokenIds

FIRST_TARGET = 8
CATASTROPHIC = 100.0  # PPL of the source, as `eval --outlier`
LENGTH = 6000  # characters of each text; more than a sequence takes
SCRIPTS = {  # first and last letter
    "Greek": ("α", "ω"),
    "Cyrillic": ("а", "я"),
    "Hebrew": ("א", "ת"),
    "Arabic": ("ب", "غ"),
    "Devanagari": ("क", "ह"),
    "Thai": ("ก", "ฮ"),
    "Hangul": ("가", "힣"),
    "CJK": ("一", "鿿"),
}


@dataclass(frozen=True)
class Row:
    """One file on one sequence; sums over its scored tokens, in nats."""

    file: str
    kind: str
    sequence: int
    n_tokens: int
    nll_sum: float
    kld_sum: float
    n_same_top: int

    @property
    def nll(self) -> float:
        return self.nll_sum / self.n_tokens

    @property
    def ppl(self) -> float:
        return math.exp(self.nll)


def _window(rng: np.random.Generator) -> str:
    text = default_corpus().text
    start = int(rng.integers(len(text) - LENGTH))
    return text[start : start + LENGTH]


def _code(rng: np.random.Generator) -> str:
    text = "\n".join(d.text for d in by_domain("score")["code"])
    start = int(rng.integers(max(1, len(text) - LENGTH)))
    return text[start : start + LENGTH]


def _word(rng: np.random.Generator) -> str:
    return str(rng.choice(_window(rng).split()))


def _repeated(rng: np.random.Generator) -> str:
    return f"{_word(rng)} " * (LENGTH // 4)


def _broken_repetition(rng: np.random.Generator) -> str:
    """Return a sentence again and again, each time with another word in its middle."""
    words = _window(rng).split()[:12]
    said = []
    for _ in range(200):
        words[6] = _word(rng)
        said.append(" ".join(words))
    return " ".join(said)


def _shuffled_words(rng: np.random.Generator) -> str:
    words = _window(rng).split()
    rng.shuffle(words)
    return " ".join(words)


def _shuffled_letters(rng: np.random.Generator) -> str:
    letters = list(_window(rng))
    rng.shuffle(letters)
    return "".join(letters)


def _printable(rng: np.random.Generator) -> str:
    return "".join(map(chr, rng.integers(33, 127, LENGTH)))


def _base64(rng: np.random.Generator) -> str:
    return base64.b64encode(rng.bytes(LENGTH)).decode("ascii")


def _hexadecimal(rng: np.random.Generator) -> str:
    return rng.bytes(LENGTH).hex(" ", 2)


def _latin1(rng: np.random.Generator) -> str:
    return "".join(c for c in rng.bytes(LENGTH).decode("latin-1") if c.isprintable())


def _script(rng: np.random.Generator) -> str:
    """Return made-up words in the letters of one script."""
    first, last = (ord(letter) for letter in SCRIPTS[str(rng.choice(list(SCRIPTS)))])
    words = [
        "".join(map(chr, rng.integers(first, last + 1, int(rng.integers(2, 9)))))
        for _ in range(LENGTH // 6)
    ]
    return " ".join(words)


KINDS: dict[str, Callable[[np.random.Generator], str]] = {
    "WikiText": _window,
    "code": _code,
    "one word repeated": _repeated,
    "a sentence repeated, one word new": _broken_repetition,
    "backwards": lambda rng: _window(rng)[::-1],
    "shuffled words": _shuffled_words,
    "shuffled letters": _shuffled_letters,
    "another script, made-up words": _script,
    "random printable ASCII": _printable,
    "base64": _base64,
    "hexadecimal": _hexadecimal,
    "bytes as Latin-1": _latin1,
}


def sequences(engine: Engine, per_kind: int, n_ctx: int) -> Iterator[tuple[str, TokenIds]]:
    """Yield the kind and the tokens of every sequence; the same texts for every model."""
    for number, (kind, make) in enumerate(KINDS.items()):
        for i in range(per_kind):
            text = make(np.random.default_rng([42, number, i]))
            ids, _ = engine.tokenize(text, add_special=False)
            yield kind, ids[:n_ctx]


def score(
    source: Path, files: Mapping[str, Path], *, per_kind: int, n_ctx: int, threads: int
) -> list[Row]:
    """Return the rows of all files, the source's first, sequence by sequence."""
    found = []
    with Engine([source, *files.values()], n_ctx=n_ctx, n_threads=threads) as engine:
        for index, (kind, ids) in enumerate(sequences(engine, per_kind, n_ctx)):
            scored = engine.score(index, ids, FIRST_TARGET, has_reference=True)
            for name, s in zip(("F16", *files), scored, strict=True):
                against = s.divergences
                if s.n_broken:
                    raise RuntimeError(f"{name}: sequence {index} ({kind}) has broken logits")
                found.append(
                    Row(
                        file=name,
                        kind=kind,
                        sequence=index,
                        n_tokens=s.n_scored,
                        nll_sum=s.nll_sum,
                        kld_sum=against.kld_sum if against else 0.0,
                        n_same_top=against.n_same_top if against else s.n_scored,
                    )
                )
    return found


def contenders(arguments: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Return files quantized at the budgets, and with noise as large as their plans' errors."""
    measurement = ramgguf.measure(
        arguments.source, encoder="rtn", formats=arguments.formats, threads=arguments.threads
    )
    found = {}
    for budget in arguments.budgets.split(","):
        plan = ramgguf.plan(measurement, budget)
        small = found[f"quantized {budget}"] = folder / f"q{budget.rstrip('%')}.gguf"
        ramgguf.quantize(arguments.source, from_plan=plan, output=small, verify=False)
        for seed in range(arguments.seeds):
            noisy = found[f"noise {budget} {seed}"] = folder / f"n{budget.rstrip('%')}-{seed}.gguf"
            ramgguf.perturb(arguments.source, plan, noisy, seed=seed, threads=arguments.threads)
    return found


def deltas(rows: Sequence[Row], prefix: str, base: Mapping[int, Row]) -> list[float]:
    """Return the mean ΔNLL of files of this name, per sequence of `base`, nats per token."""
    found: dict[int, list[float]] = {}
    for r in rows:
        if r.file.startswith(prefix) and r.sequence in base:
            found.setdefault(r.sequence, []).append(r.nll - base[r.sequence].nll)
    return [float(np.mean(found[i])) for i in sorted(found)]


def report(rows: Sequence[Row], budgets: Sequence[str]) -> None:
    """Print a Markdown table by kind, and the sign tests on catastrophic and ordinary text."""
    source = {r.sequence: r for r in rows if r.file == "F16"}
    names = [f"{what} {b}" for b in budgets for what in ("quantized", "noise")]
    print("| text | F16: median PPL |", " | ".join(f"{n}: ΔNLL" for n in names), "|")
    print("|---|" + "---|" * (1 + len(names)))
    for kind in KINDS:
        base = {i: r for i, r in source.items() if r.kind == kind}
        median = float(np.median([r.ppl for r in base.values()]))
        cells = [
            f"{np.mean(d):+.3f} ({sum(x < 0 for x in d)} of {len(d)} lower)"
            for d in (deltas(rows, n, base) for n in names)
        ]
        print(f"| {kind} | {median:,.4g} |", " | ".join(cells), "|")
    wild = {i: r for i, r in source.items() if r.ppl > CATASTROPHIC}
    tame = {i: r for i, r in source.items() if i not in wild}
    for what, base in (("catastrophic", wild), ("other", tame)):
        for name in names if base else ():
            d = deltas(rows, name, base)
            lower = sum(x < 0 for x in d)
            print(
                f"{what}, {name}: lower on {lower} of {len(d)} sequences"
                f" (sign test p = {sign_p(np.sign(d)):.2g}), median ΔNLL {np.median(d):+.4f}"
            )
    for name in ("F16", *names):
        files = [r for r in rows if r.file.startswith(name)]
        nll = sum(r.nll_sum for r in files) / sum(r.n_tokens for r in files)
        values = [r.ppl for r in files]
        print(
            f"{name}: corpus PPL {math.exp(nll):,.1f}, median {np.median(values):,.1f}, largest"
            f" {max(values):,.0f}, {np.mean(np.array(values) > CATASTROPHIC):.0%} above 100"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--budgets", default="30%,40%", help="of the source's bytes")
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    parser.add_argument("--seeds", type=int, default=2, help="noisy files for each budget")
    parser.add_argument("--per-kind", type=int, default=4)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/catastrophes.jsonl"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        rows = score(
            arguments.source,
            contenders(arguments, Path(folder)),
            per_kind=arguments.per_kind,
            n_ctx=arguments.n_ctx,
            threads=arguments.threads,
        )
    origin = {"model": arguments.source.stem, **provenance()}
    with arguments.out.open("a") as out:
        for name in dict.fromkeys(row.file for row in rows):
            mine = [asdict(row) for row in rows if row.file == name]
            for each in mine:
                del each["file"]
            out.write(json.dumps({**origin, "file": name, "sequences": mine}) + "\n")
    report(rows, arguments.budgets.split(","))


if __name__ == "__main__":
    main()
