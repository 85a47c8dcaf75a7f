"""How models answer multiple-choice tasks, for the terminal, model cards and programs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from ramgguf.core.units import format_count
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.multiple_choice import Flips, TaskResult
from ramgguf.report.grid import Field, Grid, captioned_markdown, grid_of
from ramgguf.report.numbers import estimate_json, p_value, with_interval
from ramgguf.report.terminal import print_captioned

TITLE = "Multiple choice by log-likelihood (95 % intervals)"


@dataclass(frozen=True)
class _Row:
    """What a row shows: a model's answers; task and number of items stand in a task's first."""

    task: str
    n_items: int
    label: str
    accuracy: Estimate
    norm: Estimate
    flips: Flips | None = None


def task_grid(results: Sequence[TaskResult]) -> Grid:
    """Return a row per task and model: accuracy, and the flips against the reference."""
    fields: list[Field[_Row]] = [
        Field("task", lambda r: r.task, number=False),
        Field("items", lambda r: str(r.n_items) if r.task else "", 3),
        Field("model", lambda r: r.label, number=False),
        Field("accuracy", lambda r: _share(r.accuracy)),
        Field("accuracy norm", lambda r: _share(r.norm), 3),
        Field("changed answers", _of_flips(_changed), 1),
        Field("lost", _of_flips(lambda f: str(f.n_lost))),
        Field("gained", _of_flips(lambda f: str(f.n_gained))),
        Field("p McNemar", _of_flips(lambda f: p_value(f.p))),
    ]
    first = results[0]
    tasks = (*first.tasks, *((None,) if len(first.tasks) > 1 else ()))
    rows = (row for task in tasks for row in _rows(results, task))
    return grid_of(TITLE, fields, rows).without_empty_columns()


def _rows(results: Sequence[TaskResult], task: str | None) -> Iterator[_Row]:
    name, n = task or "all", sum(task in (None, i.task) for i in results[0].items)
    if (reference := results[0].reference) is not None:
        accuracy, norm = (results[0].reference_accuracy(task, norm=x) for x in (False, True))
        yield _Row(name, n, reference.label, accuracy, norm)
        name = ""
    for r in results:
        accuracy, norm = (r.accuracy(task, norm=x) for x in (False, True))
        yield _Row(name, n, r.model.label, accuracy, norm, r.flips(task))
        name = ""


def _share(found: Estimate) -> str:
    return with_interval(found, lambda x: f"{100 * x:.1f} %")


def _changed(flips: Flips) -> str:
    return f"{flips.n_changed} ({100 * flips.changed.value:.1f} %)"


def _of_flips(write: Callable[[Flips], str]) -> Callable[[_Row], str]:
    return lambda row: "" if row.flips is None else write(row.flips)


def task_line(result: TaskResult) -> str:
    """Return how it was measured, and what is to be known of it."""
    cut = f"; {result.n_truncated} were cut to the context" if result.n_truncated else ""
    return (
        f"{format_count(len(result.items), 'item')}{cut}; the answer is the choice of largest log "
        "p (norm: per byte). Lost and gained: right under one model only; p: exact McNemar test. "
        f"llama.cpp {result.llama_cpp_build}{', safe kernels' if result.safe_kernels else ''}."
    )


def print_tasks(results: Sequence[TaskResult], console: Console) -> None:
    """Print the table and how it was measured."""
    print_captioned(console, task_grid(results), map(task_line, results))


def tasks_markdown(results: Sequence[TaskResult]) -> str:
    """Return the table for a model card."""
    return captioned_markdown(task_grid(results), map(task_line, results))


def summary(result: TaskResult) -> dict[str, object]:
    """Return the figures of each task and of all, for --json."""
    return {task or "all": _task(result, task) for task in (*result.tasks, None)}


def _task(result: TaskResult, task: str | None) -> dict[str, object]:
    found: dict[str, object] = {
        "accuracy": estimate_json(result.accuracy(task)),
        "accuracy_norm": estimate_json(result.accuracy(task, norm=True)),
    }
    if (flips := result.flips(task)) is not None:
        found |= {
            "reference_accuracy": estimate_json(result.reference_accuracy(task)),
            "n_changed": flips.n_changed,
            "n_lost": flips.n_lost,
            "n_gained": flips.n_gained,
            "p_mcnemar": flips.p,
        }
    return found
