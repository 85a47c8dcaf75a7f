"""The commands from file to numbers: eval."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from ramgguf import api
from ramgguf.cli import options as opt
from ramgguf.report.evaluation import eval_csv, eval_json, eval_markdown, print_eval
from ramgguf.study import study


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "eval",
        epilog="Example: ramgguf eval small.gguf --reference model-f16.gguf -o scores.jsonl",
    )(evaluate)


Models = Annotated[list[Path], typer.Argument(metavar="MODEL...", help="GGUF files to score.")]
Reference = Annotated[
    Path | None,
    typer.Option("--reference", "-r", help="Model to compare with, token by token: KLD."),
]
ProtocolOption = Annotated[
    str,
    typer.Option("--protocol", help="ram: 128 drawn sequences of 2048; llama: llama-perplexity's."),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", "--context", min=8, help="Tokens per sequence."),
]
NSeq = Annotated[int | None, typer.Option("--n-seq", min=1, help="Sequences to score.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draw of sequences.")]
Bos = Annotated[bool, typer.Option("--bos", help="Start every sequence with BOS (ram).")]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="Text or parquet file to score instead of WikiText-2.")
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Dataset on the hub, NAME[:CONFIGURATION].")
]
SplitOption = Annotated[str, typer.Option("--split", help="Split of --dataset.")]
Safe = Annotated[
    bool | None,
    typer.Option(
        "--safe-kernels/--no-safe-kernels",
        help="Without llama.cpp's extra buffer types (AMX); by default when it crashes with them.",
    ),
]
Results = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="JSON lines: every sequence, as it finishes."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --output already has.")]
Outlier = Annotated[float, typer.Option("--outlier", help="Sequence PPL above which it is one.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print tables for a model card.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")]


def evaluate(
    models: Models,
    reference: Reference = None,
    protocol: ProtocolOption = "ram",
    seq_len: SeqLen = None,
    n_seq: NSeq = None,
    seed: Seed = 42,
    bos: Bos = False,
    text: TextFile = None,
    dataset: Dataset = None,
    split: SplitOption = "test",
    safe_kernels: Safe = None,
    output: Results = None,
    resume: Resume = False,
    outlier: Outlier = 100.0,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    as_csv: AsCsv = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Score models by llama.cpp on the CPU, sequence by sequence."""
    printed = as_json or as_markdown or as_csv
    terminal = opt.Terminal.make(quiet=quiet, as_json=printed)
    found = api.evaluate(
        models,
        reference,
        protocol=_protocol(protocol),
        n_ctx=seq_len,
        n_seq=n_seq,
        seed=seed,
        bos=bos,
        text=text,
        dataset=dataset,
        split=split,
        safe_kernels=safe_kernels,
        jsonl=output,
        resume=resume,
        threads=threads,
        verbose=verbose,
        progress=terminal.progress,
    )
    said = study(found.results, np.random.default_rng(0), outlier_ppl=outlier)
    if as_json:
        print(eval_json(said))
    elif as_markdown:
        print(eval_markdown(said))
    elif as_csv:
        print(eval_csv(said), end="")
    else:
        print_eval(said, terminal.out)
    for failure in found.failures:
        terminal.err.print(f"error: {failure}", markup=False)
    if found.failures:
        raise typer.Exit(1)


def _protocol(name: str) -> Literal["ram", "llama"]:
    if name == "ram":
        return "ram"
    if name == "llama":
        return "llama"
    raise typer.BadParameter(f"{name!r} is none of ram, llama", param_hint="--protocol")
