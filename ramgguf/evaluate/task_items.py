"""Items of multiple-choice tasks: files of JSON lines, datasets, and sets made from the package.

One item a line: {"context": "The capital of France is", "choices": [" Paris", " Rome"],
"answer": 0}, with "task", the name of its table, if there are several. A choice is appended to the
context as it is, so its space belongs to it. "context" may be a list, one for each choice.
Rows of HellaSwag, ARC, MMLU and Winogrande, as their files and datasets have them, are known too.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramgguf.core.corpus import load_dataset
from ramgguf.core.errors import EngineError
from ramgguf.core.inputs import read_text
from ramgguf.core.mix import by_domain

MADE = ("cloze", "arithmetic")
_CONTEXT_WORDS, _CHOICE_WORDS, _N_CHOICES = 32, 8, 4
_MADE_SEED, _PER_DOMAIN, _N_SUMS = 42, 40, 100
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """A question: contexts[i] + choices[i] is a text for each choice; answer is the right one."""

    task: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


def items_of(name: str, split: str = "validation") -> tuple[Item, ...]:
    """Return the items of a made set, a file of JSON lines, or a dataset of this name.

    Raises EngineError that names the line and what is wrong with it.
    """
    if name == "cloze":
        return tuple(_cloze())
    if name == "arithmetic":
        return tuple(_arithmetic())
    path = Path(name)
    if path.is_file():
        return tuple(_items(path.stem, _lines(path), str(path)))
    if path.suffix or "/" not in name:
        raise EngineError(
            f"task {name!r} is none of {', '.join(MADE)}, no file, and no dataset (ORG/NAME)"
        )
    rows = enumerate(load_dataset(name, split=split), start=1)
    places = ((f"{name}/{split}: item {number}", row) for number, row in rows)
    return tuple(_items(name.rpartition("/")[2], places, f"{name}/{split}"))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row is, and the row. Lines end in \\n only: JSON has U+2028 as it is."""
    for number, line in enumerate(read_text(path, error=EngineError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}: line {number}", json.loads(line)
        except (ValueError, RecursionError) as e:
            raise EngineError(f"{path}: line {number} is not JSON ({e})") from None


def _items(task: str, rows: Iterator[tuple[str, Any]], name: str) -> Iterator[Item]:
    found = 0
    for where, row in rows:
        try:
            item = _item(task, row)
            _check_texts(item)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            what = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            raise EngineError(
                f"{where} is no multiple choice ({what}); expected "
                '{"context": …, "choices": […], "answer": 0}, or a row of HellaSwag, ARC, MMLU or '
                "Winogrande"
            ) from None
        if len(item.choices) < 2 or not all(item.choices) or not all(item.contexts):
            raise EngineError(f"{where} has an empty text, or fewer than 2 choices")
        if not 0 <= item.answer < len(item.choices):
            raise EngineError(
                f"{where} has {len(item.choices)} choices and the answer "
                f"{item.answer}, expected 0 … {len(item.choices) - 1}"
            )
        found += 1
        yield item
    if not found:
        raise EngineError(f"{name} has no item")


def _text(value: object) -> str:
    """Return a text; a number is one. Raises TypeError for what else JSON has."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"{value!r} is no text")


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(map(_text, values))


def _index(value: object) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    raise ValueError(f"{value!r} is no number of a choice")


def _check_texts(item: Item) -> None:
    """Raise TypeError where a text is none, ValueError where it is no UTF-8 (half a surrogate)."""
    for text in (item.task, *item.contexts, *item.choices):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r} cannot be written as UTF-8") from None


def _item(task: str, row: Mapping[str, Any]) -> Item:
    if "context" in row:
        context, choices = row["context"], _texts(row["choices"])
        contexts = (context,) * len(choices) if isinstance(context, str) else tuple(context)
        if len(contexts) != len(choices):
            raise ValueError(f"{len(contexts)} contexts for {len(choices)} choices")
        return Item(_text(row.get("task", task)), contexts, choices, _index(row["answer"]))
    if "endings" in row:  # HellaSwag
        choices = tuple(f" {e}" for e in _texts(row["endings"]))
        return Item(task, (row["ctx"],) * len(choices), choices, _index(row["label"]))
    if "sentence" in row:  # Winogrande: the same end after either name
        before, _, after = row["sentence"].partition("_")
        contexts = tuple(before + row[f"option{i}"] for i in (1, 2))
        return Item(task, contexts, (after, after), _index(row["answer"]) - 1)
    return _question(task, row)


def _question(task: str, row: Mapping[str, Any]) -> Item:
    """Return an item of ARC (a choice's text is the answer) or MMLU (its letter is)."""
    question: Any = row["question"]
    choices: Any = row.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    elif isinstance(choices[0], Mapping):
        texts, labels = ([c[key] for c in choices] for key in ("text", "label"))
    else:
        choices = _texts(choices)
        letters = _LETTERS[: len(choices)]
        listed = "".join(f"{x}. {c}\n" for x, c in zip(letters, choices, strict=True))
        context = f"{question.strip()}\n{listed}Answer:"
        answer = row["answer"]
        at = letters.index(answer) if isinstance(answer, str) else _index(answer)
        return Item(task, (context,) * len(choices), tuple(f" {x}" for x in letters), at)
    texts = _texts(texts)
    context = f"Question: {_text(question)}\nAnswer:"
    answer = list(labels).index(row["answerKey"])
    return Item(task, (context,) * len(texts), tuple(f" {t}" for t in texts), answer)


# --- made sets ---


def _cloze() -> Iterator[Item]:
    """Yield passages of the package's texts and four ends: its own, three of other passages.

    The texts are of the part that nothing is calibrated or gated on.
    """
    rng = np.random.default_rng(_MADE_SEED)
    for domain, documents in by_domain("score").items():
        texts = [d.text or "\n".join(t.content for t in d.turns) for d in documents]
        passages = [p for text in texts for p in _passages(text)]
        chosen = rng.permutation(len(passages))[:_PER_DOMAIN]
        for i in sorted(int(i) for i in chosen):
            context, end = passages[i]
            others = [e for k, (_, e) in enumerate(passages) if k != i and e != end]
            picked = [others[int(k)] for k in rng.permutation(len(others))[: _N_CHOICES - 1]]
            yield _shuffled(f"cloze-{domain}", context, end, picked, rng)


def _passages(text: str) -> Iterator[tuple[str, str]]:
    words = text.split(" ")
    step = _CONTEXT_WORDS + _CHOICE_WORDS
    for start in range(0, len(words) - step + 1, step):
        context = " ".join(words[start : start + _CONTEXT_WORDS])
        end = " ".join(words[start + _CONTEXT_WORDS : start + step])
        if context.strip() and end.strip():
            yield context, f" {end}"


def _arithmetic() -> Iterator[Item]:
    """Yield sums and differences of numbers below 100, after three solved ones."""
    rng = np.random.default_rng(_MADE_SEED)
    for _ in range(_N_SUMS):
        numbers = [(int(rng.integers(2, 99)), int(rng.integers(2, 99))) for _ in range(4)]
        signs = ["+-"[int(rng.integers(2))] for _ in numbers]
        solved = [
            (f"{max(a, b)} {s} {min(a, b)} =", a + b if s == "+" else abs(a - b))
            for (a, b), s in zip(numbers, signs, strict=True)
        ]
        shown = "".join(f"{question} {value}\n" for question, value in solved[:-1])
        question, value = solved[-1]
        near = [value + d for d in (-10, -2, -1, 1, 2, 10) if value + d >= 0]
        wrong = [f" {near[int(i)]}" for i in rng.permutation(len(near))[: _N_CHOICES - 1]]
        yield _shuffled("arithmetic", shown + question, f" {value}", wrong, rng)


def _shuffled(
    task: str, context: str, right: str, wrong: Sequence[str], rng: np.random.Generator
) -> Item:
    choices = [right, *wrong]
    order = [int(i) for i in rng.permutation(len(choices))]
    texts = tuple(choices[i] for i in order)
    return Item(task, tuple(itertools.repeat(context, len(texts))), texts, order.index(0))
