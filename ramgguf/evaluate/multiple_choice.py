"""Multiple-choice tasks by log-likelihood: which answers a model gives, and which are others now.

A model answers with the choice of largest log p (accuracy), or of largest log p per character
of the choice (accuracy norm), as lm-evaluation-harness has them. Equal accuracy hides answers that
changed both ways: flips count these (Dutta et al. 2024, arXiv 2407.09141).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, Field

from ramgguf.core.documents import Document, FrozenModel, NonNegative, Number
from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.version import __version__
from ramgguf.evaluate.evaluation import identify
from ramgguf.evaluate.intervals import Estimate, share_estimate
from ramgguf.evaluate.result import ModelFile
from ramgguf.evaluate.statistics import SequenceLosses
from ramgguf.evaluate.task_items import MADE, Item, items_of
from ramgguf.gguf.hub import local_path
from ramgguf.llama.client import Engine, with_kernels
from ramgguf.llama.protocol import TokenIds

N_CTX = 2048

Bools = npt.NDArray[np.bool_]


class ItemScore(FrozenModel):
    """An item's log p of each choice, nats, under model and reference.

    n_characters of each choice, without the space before it, are what lm-evaluation-harness divides
    log p by; files that say n_bytes have the bytes with that space instead.
    """

    task: str
    answer: NonNegative
    n_characters: tuple[NonNegative, ...] = Field(
        validation_alias=AliasChoices("n_characters", "n_bytes")
    )
    log_p: tuple[Number, ...]
    reference_log_p: tuple[Number, ...] | None = None


@dataclass(frozen=True)
class Flips:
    """Answers that are others than the reference's: all, those now wrong, those now right.

    p is McNemar's: how probable so unequal numbers lost and gained are if both were alike (exact).
    """

    n: int
    n_changed: int
    n_lost: int
    n_gained: int
    changed: Estimate
    p: float


class TaskResult(Document):
    """A model's log-likelihoods of every choice, item by item; those of a reference beside them.

    n_truncated items were longer than the context and lost the start of theirs.
    """

    KIND: ClassVar[str] = "tasks"

    ramgguf_version: str
    model: ModelFile
    reference: ModelFile | None = None
    llama_cpp_build: str
    safe_kernels: bool
    items: Annotated[tuple[ItemScore, ...], Field(min_length=1)]
    n_truncated: NonNegative = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the items' order."""
        return tuple(dict.fromkeys(i.task for i in self.items))

    def accuracy(self, task: str | None = None, *, norm: bool = False) -> Estimate:
        """Return the share of right answers with its interval; items count as independent."""
        kept = self._kept(task)
        return _share(_right(kept, [_answer(i, i.log_p, norm) for i in kept]))

    def reference_accuracy(self, task: str | None = None, *, norm: bool = False) -> Estimate:
        """Return the reference's accuracy on the same items."""
        kept = self._kept(task)
        return _share(_right(kept, [_answer(i, _reference(i), norm) for i in kept]))

    def flips(self, task: str | None = None, *, norm: bool = False) -> Flips | None:
        """Return which answers are others than the reference's; None without a reference."""
        from scipy import stats

        if self.reference is None:
            return None
        kept = self._kept(task)
        mine = [_answer(i, i.log_p, norm) for i in kept]
        theirs = [_answer(i, _reference(i), norm) for i in kept]
        right, was_right = _right(kept, mine), _right(kept, theirs)
        changed = np.array(mine) != np.array(theirs)
        lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        return Flips(len(kept), int(changed.sum()), lost, gained, _share(changed), p)

    def _kept(self, task: str | None) -> list[ItemScore]:
        return [i for i in self.items if task in (None, i.task)]


def _reference(item: ItemScore) -> tuple[float, ...]:
    if item.reference_log_p is None:
        raise EngineError("this result has no reference")
    return item.reference_log_p


def _answer(item: ItemScore, log_p: Sequence[float], norm: bool) -> int:
    values = np.array(log_p) / np.maximum(1, item.n_characters) if norm else np.array(log_p)
    return int(values.argmax())


def _right(items: Sequence[ItemScore], answers: Sequence[int]) -> Bools:
    return np.array([i.answer == a for i, a in zip(items, answers, strict=True)], bool)


def _share(hits: Bools) -> Estimate:
    ones = np.ones(len(hits), np.int64)
    sample = SequenceLosses(nll_sum=ones.astype(np.float64), n_tokens=ones)
    return share_estimate(hits.astype(np.float64), sample)


@dataclass(frozen=True)
class TaskResults:
    """The results in the order of the models."""

    results: tuple[TaskResult, ...]


def tasks(
    models: Sequence[str | Path],
    names: Sequence[str] = MADE,
    reference: str | Path | None = None,
    *,
    split: str = "validation",
    limit: int | None = None,
    safe_kernels: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TaskResults:
    """Return how models answer tasks: made sets, files of JSON lines, datasets (task_items.py).

    limit takes the first items of each task only. Models are loaded one after the other. Raises
    EngineError when llama.cpp fails, or an item is none.
    """
    items = [item for name in names for item in _first(items_of(name, split), limit)]
    paths = [local_path(m) for m in models]
    if not paths:
        raise EngineError("there is no model to answer tasks")
    if not items:
        raise EngineError(f"there is no item to answer in {', '.join(names) or 'no task'}")
    source = local_path(reference) if reference is not None else None
    shown = progress or Silent()

    def answered(safe: bool) -> TaskResults:
        return _answers(paths, source, items, safe, threads or default_threads(), shown)

    return with_kernels(answered, safe_kernels)


def _first(items: Sequence[Item], limit: int | None) -> Iterator[Item]:
    seen: dict[str, int] = {}
    for item in items:
        seen[item.task] = seen.get(item.task, 0) + 1
        if limit is None or seen[item.task] <= limit:
            yield item


def _answers(
    paths: Sequence[Path],
    source: Path | None,
    items: Sequence[Item],
    safe: bool,
    threads: int,
    progress: Progress,
) -> TaskResults:
    loaded = ([source] if source is not None else []) + [*paths]
    progress.start("answer", len(loaded) * len(items), "items")
    found, builds, truncated = [], set(), 0
    try:
        for path in loaded:
            with Engine([path], n_ctx=N_CTX, n_threads=threads, safe_kernels=safe) as engine:
                builds.add(engine.opened.system.build)
                scores = []
                for number, item in enumerate(items):
                    values, was_cut = _log_p(engine, number, item)
                    truncated += was_cut and path is loaded[0]
                    scores.append(values)
                    progress.advance(1)
            found.append(scores)
    finally:
        progress.finish()
    expected = found.pop(0) if source is not None else None
    reference = identify(source) if source is not None else None
    return TaskResults(
        tuple(
            TaskResult(
                ramgguf_version=__version__,
                model=identify(path),
                reference=reference,
                llama_cpp_build=", ".join(sorted(builds)),
                safe_kernels=safe,
                items=tuple(
                    ItemScore(
                        task=item.task,
                        answer=item.answer,
                        n_characters=tuple(len(c.removeprefix(" ")) for c in item.choices),
                        log_p=scores[i],
                        reference_log_p=expected[i] if expected is not None else None,
                    )
                    for i, item in enumerate(items)
                ),
                n_truncated=truncated,
            )
            for path, scores in zip(paths, found, strict=True)
        )
    )


def _log_p(engine: Engine, number: int, item: Item) -> tuple[tuple[float, ...], bool]:
    """Return log p of each choice, and whether the item had to be cut."""
    sequences, was_cut = [], False
    for context, choice in zip(item.contexts, item.choices, strict=True):
        ids, n_scored = encoded(engine, context, choice)
        was_cut |= len(ids) > N_CTX
        sequences.append((ids[-N_CTX:], min(n_scored, N_CTX - 1)))
    found = engine.likelihoods(number, sequences)
    return tuple(value for value, _ in found), was_cut


def prompt_ids(engine: Engine, text: str) -> TokenIds:
    """Return the tokens of a text that goes on: BOS where the tokenizer adds it, but no EOS."""
    ids, _ = engine.tokenize(text, add_special=True)
    around, _ = engine.tokenize("", add_special=True)
    vocab = engine.opened.models[0].vocab
    n_after = len(around) - int(vocab.adds_bos and vocab.bos >= 0)
    return ids[: len(ids) - max(0, n_after)]


def encoded(engine: Engine, context: str, continuation: str) -> tuple[TokenIds, int]:
    """Return the tokens of both as one text, and how many of the last are the continuation's.

    Spaces at the context's end go with the continuation, as tokenizers join them to what follows.
    A token that lies on both is scored. Where nothing precedes the continuation's tokens, BOS does;
    without one, the first of them is not scored.
    """
    spaces = len(context) - len(context.rstrip(" "))
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, alone = prompt_ids(engine, context + continuation), prompt_ids(engine, context)
    n = min(len(whole), len(alone))
    differs = np.flatnonzero(whole[:n] != alone[:n])
    shared = int(differs[0]) if len(differs) else n
    bos = engine.opened.models[0].vocab.bos
    if shared == 0 and bos >= 0:
        return np.concatenate([np.array([bos], np.int32), whole]), len(whole)
    return whole, len(whole) - max(1, min(shared, len(whole) - 1))
