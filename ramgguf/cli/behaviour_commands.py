"""The commands that look at what models do: trajectories (their texts), tasks (their answers)."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.core.documents import Document
from ramgguf.core.escape import to_json
from ramgguf.evaluate import continuations as defaults
from ramgguf.evaluate.corpora import DOMAINS
from ramgguf.evaluate.task_items import MADE
from ramgguf.report import tasks as task_report
from ramgguf.report.trajectories import print_trajectories, summary, trajectories_markdown

R = TypeVar("R", bound=Document)


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "trajectories",
        epilog="Example: ramgguf trajectories small.gguf --reference model-f16.gguf -o paths.jsonl",
    )(trajectories)
    app.command(
        "tasks",
        epilog="Example: ramgguf tasks small.gguf --reference model-f16.gguf --task arithmetic",
    )(tasks)


Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL...", help="GGUF files, also hf://ORG/REPO/FILE.gguf."),
]
Reference = Annotated[
    Path, typer.Option("--reference", "-r", help="Model whose continuations are the measure.")
]
Prompts = Annotated[int, typer.Option("--prompts", min=8, help="Prompts, over all domains.")]
NTokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens after each prompt.")]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        help="Where prompts are from, as in eval: prose, code, math, chat, multilingual (all by"
        " default), long, wikitext or FILE; repeatable, or prose,code.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Prompts that are read side by side.")]
Lines = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON lines: every batch, as it finishes.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --output already has.")]
Safe = Annotated[
    bool | None,
    typer.Option(
        "--safe-kernels/--no-safe-kernels",
        help="Without llama.cpp's extra buffer types (AMX); by default when it crashes with them.",
    ),
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print a table for a model card.")]


def trajectories(
    models: Models,
    reference: Reference,
    prompts: Prompts = defaults.N_PROMPTS,
    tokens: NTokens = defaults.N_TOKENS,
    corpus: Domains = None,
    batch: Batch = defaults.BATCH,
    safe_kernels: Safe = None,
    output: Lines = None,
    resume: Resume = False,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    quiet: opt.Quiet = False,
) -> None:
    """Generate greedily from prompts, and say where models part from their reference."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json or as_markdown)
    found = api.trajectories(
        [terminal.fetched(model) for model in models],
        terminal.fetched(reference),
        n_prompts=prompts,
        n_tokens=tokens,
        domains=[d for part in corpus or () for d in part.split(",")] or tuple(DOMAINS),
        batch=batch,
        safe_kernels=safe_kernels,
        jsonl=output,
        resume=resume,
        threads=threads,
        progress=terminal.progress,
    ).results
    if as_json:
        _print_json(found, summary)
    elif as_markdown:
        print(trajectories_markdown(found), end="")
    else:
        print_trajectories(found, terminal.out)


OptionalReference = Annotated[
    Path | None, typer.Option("--reference", "-r", help="Model whose answers are the measure.")
]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-k",
        help="cloze, arithmetic (both by default), a file of JSON lines, or a dataset"
        " ORG/NAME[:CONFIGURATION]; repeatable.",
    ),
]
Split = Annotated[str, typer.Option("--split", help="Split of datasets.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task.")]


def tasks(
    models: Models,
    reference: OptionalReference = None,
    task: TaskNames = None,
    split: Split = "validation",
    limit: Limit = None,
    safe_kernels: Safe = None,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    quiet: opt.Quiet = False,
) -> None:
    """Answer multiple-choice tasks by log-likelihood, and count answers that changed."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json or as_markdown)
    found = api.tasks(
        [terminal.fetched(model) for model in models],
        task or MADE,
        reference and terminal.fetched(reference),
        split=split,
        limit=limit,
        safe_kernels=safe_kernels,
        threads=threads,
        progress=terminal.progress,
    ).results
    if as_json:
        _print_json(found, task_report.summary)
    elif as_markdown:
        print(task_report.tasks_markdown(found), end="")
    else:
        task_report.print_tasks(found, terminal.out)


def _print_json(results: Iterable[R], summary: Callable[[R], dict[str, object]]) -> None:
    """Print the results as one document, each with its figures."""
    documents = [{**json.loads(r.to_json()), "summary": summary(r)} for r in results]
    print(to_json(documents, indent=1))
