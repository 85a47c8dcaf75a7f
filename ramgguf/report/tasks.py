"""How models answer multiple-choice tasks, for the terminal, model cards and programs."""

from collections.abc import Sequence

from rich.console import Console

from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.multiple_choice import Flips, TaskResult
from ramgguf.report.grid import Column, Grid, to_markdown
from ramgguf.report.numbers import p_value, with_interval
from ramgguf.report.terminal import print_grid

TITLE = "Multiple choice by log-likelihood (95 % intervals)"


def task_grid(results: Sequence[TaskResult]) -> Grid:
    """Return a row per task and model: accuracy, and the flips against the reference."""
    columns = (
        Column("task", number=False),
        Column("items", 3),
        Column("model", number=False),
        Column("accuracy"),
        Column("accuracy norm", 3),
        Column("changed answers", 1),
        Column("lost"),
        Column("gained"),
        Column("p McNemar"),
    )
    rows = []
    for task in (*results[0].tasks, *((None,) if len(results[0].tasks) > 1 else ())):
        name, n = task or "all", sum(task in (None, i.task) for i in results[0].items)
        if results[0].reference is not None:
            r = results[0]
            figures = (r.reference_accuracy(task), r.reference_accuracy(task, norm=True))
            label = results[0].reference.label
            rows.append((name, str(n), label, *map(_share, figures), "", "", "", ""))
            name = ""
        for r in results:
            figures = (r.accuracy(task), r.accuracy(task, norm=True))
            row = (r.model.label, *map(_share, figures), *_flips(r.flips(task)))
            rows.append((name, str(n) if name else "", *row))
            name = ""
    return Grid(TITLE, columns, tuple(rows)).without_empty_columns()


def _share(found: Estimate) -> str:
    return with_interval(found, lambda x: f"{100 * x:.1f} %")


def _flips(found: Flips | None) -> tuple[str, str, str, str]:
    if found is None:
        return ("", "", "", "")
    changed = f"{found.n_changed} ({100 * found.changed.value:.1f} %)"
    return (changed, str(found.n_lost), str(found.n_gained), p_value(found.p))


def task_line(result: TaskResult) -> str:
    """Return how it was measured, and what is to be known of it."""
    cut = f"; {result.n_truncated} were cut to the context" if result.n_truncated else ""
    return (
        f"{len(result.items)} items{cut}; the answer is the choice of largest log p (norm: per"
        " byte). Lost and gained: right under one model only; p: exact McNemar test."
        f" llama.cpp {result.llama_cpp_build}{', safe kernels' if result.safe_kernels else ''}."
    )


def print_tasks(results: Sequence[TaskResult], console: Console) -> None:
    """Print the table and how it was measured."""
    print_grid(console, task_grid(results))
    for line in dict.fromkeys(task_line(r) for r in results):
        console.print(line, soft_wrap=True)


def tasks_markdown(results: Sequence[TaskResult]) -> str:
    """Return the table for a model card."""
    lines = dict.fromkeys(task_line(r) for r in results)
    return f"**{TITLE}**\n\n{to_markdown(task_grid(results))}\n{' '.join(lines)}\n"


def summary(result: TaskResult) -> dict[str, object]:
    """Return the figures of each task and of all, for --json."""
    return {task or "all": _task(result, task) for task in (*result.tasks, None)}


def _task(result: TaskResult, task: str | None) -> dict[str, object]:
    found: dict[str, object] = {
        "accuracy": _values(result.accuracy(task)),
        "accuracy_norm": _values(result.accuracy(task, norm=True)),
    }
    if (flips := result.flips(task)) is not None:
        found |= {
            "reference_accuracy": _values(result.reference_accuracy(task)),
            "n_changed": flips.n_changed,
            "n_lost": flips.n_lost,
            "n_gained": flips.n_gained,
            "p_mcnemar": flips.p,
        }
    return found


def _values(found: Estimate) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}
