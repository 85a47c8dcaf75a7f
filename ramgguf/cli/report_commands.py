"""The commands from numbers to judgement: compare, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer

from ramgguf.cli import options as opt
from ramgguf.comparison import compare_published
from ramgguf.errors import ResultError
from ramgguf.report import boards, evaluation
from ramgguf.report.page import write_html
from ramgguf.result_files import read_material
from ramgguf.study import study
from ramgguf.units import format_bytes

# The resamples behind intervals and p-values: the same files always give the same numbers.
_SEED = 0


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command("compare", epilog="Example: ramgguf compare a.jsonl b.jsonl")(compare)
    app.command(
        "report", epilog="Example: ramgguf report scores.jsonl plan.json model.rd.json -o r.html"
    )(report)


ResultFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...", help="Results of eval (.jsonl, .json), or published figures (.csv)."
    ),
]
AnyFiles = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="Results of eval, plans and measurements."),
]
Outlier = Annotated[float, typer.Option("--outlier", help="Sequence PPL above which it is one.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print tables for a model card.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")]


def compare(
    files: ResultFiles,
    outlier: Outlier = 100.0,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    as_csv: AsCsv = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rank results by several criteria; say where these disagree, why, and if it means anything."""
    console = opt.Terminal.make(quiet=quiet, as_json=False).out
    material = read_material(files)
    if material.aggregates and material.results:
        raise ResultError(
            "published figures have no sequences and are not ranked together with results;"
            " compare the CSV files on their own"
        )
    if material.aggregates:
        board = compare_published(material.aggregates)
        forms = (boards.board_json, boards.board_markdown, boards.board_csv)
        if (form := _chosen(forms, (as_json, as_markdown, as_csv))) is not None:
            print(form(board), end="")
        else:
            boards.print_board(board, console)
        return
    if not material.results:
        raise ResultError("nothing to compare: the files hold no results")
    made = study(material.results, np.random.default_rng(_SEED), outlier_ppl=outlier)
    if made.refusal is not None and len(material.results) > 1:
        raise ResultError(made.refusal)
    texts = (evaluation.eval_json, evaluation.eval_markdown, evaluation.eval_csv)
    if (text := _chosen(texts, (as_json, as_markdown, as_csv))) is not None:
        print(text(made), end="")
    else:
        evaluation.print_eval(made, console)


T = TypeVar("T")


def _chosen(forms: Sequence[T], asked: Sequence[bool]) -> T | None:
    """Return the first form that was asked for, or None."""
    return next((form for form, is_asked in zip(forms, asked, strict=True) if is_asked), None)


def report(
    files: AnyFiles,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    outlier: Outlier = 100.0,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Draw one self-contained HTML page of results, plans and measurements."""
    opt.refuse_existing(output, force)
    material = read_material(files)
    made = study(material.results, np.random.default_rng(_SEED), outlier_ppl=outlier)
    write_html(output, made, material.plans, material.measurements)
    opt.Terminal.make(quiet=quiet, as_json=False).out.print(
        f"{output}: {len(material.results)} results, {len(material.plans)} plans,"
        f" {len(material.measurements)} measurements; {format_bytes(output.stat().st_size)}"
    )
