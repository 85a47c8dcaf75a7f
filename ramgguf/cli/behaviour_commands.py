"""The command that compares what models write themselves: trajectories."""

import json
from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.evaluate import continuations as defaults
from ramgguf.evaluate.corpora import DOMAINS
from ramgguf.report.trajectories import print_trajectories, summary, trajectories_markdown


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "trajectories",
        epilog="Example: ramgguf trajectories small.gguf --reference model-f16.gguf -o paths.jsonl",
    )(trajectories)


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
        print(
            json.dumps(
                [{**json.loads(r.to_json()), "summary": summary(r)} for r in found],
                indent=1,
                ensure_ascii=False,
                allow_nan=False,
            )
        )
    elif as_markdown:
        print(trajectories_markdown(found), end="")
    else:
        print_trajectories(found, terminal.out)
