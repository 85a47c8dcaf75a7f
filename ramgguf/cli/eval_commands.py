"""The commands from file to numbers: eval, compare, report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.cluster.executors import connected
from ramgguf.core.errors import ResultError
from ramgguf.core.units import format_bytes
from ramgguf.evaluate.common_sequences import check_comparable
from ramgguf.evaluate.comparison import compare_published
from ramgguf.evaluate.domains import by_text
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.leaderboard import Leaderboard
from ramgguf.evaluate.protocol import ProtocolName
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.report.boards import board_csv, board_json, board_markdown, print_board
from ramgguf.report.embeddings import (
    embeddings_csv,
    embeddings_json,
    embeddings_markdown,
    print_embeddings,
)
from ramgguf.report.page import write_html
from ramgguf.report.results import eval_csv, eval_json, eval_markdown, print_eval, reports
from ramgguf.report.trajectories import print_trajectories


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "eval",
        epilog="Example: ramgguf eval small.gguf --reference model-f16.gguf -o scores.jsonl",
    )(evaluate)
    app.command("compare", epilog="Example: ramgguf compare scores.jsonl --markdown")(compare)
    app.command("report", epilog="Example: ramgguf report scores.jsonl -o report.html")(report)


_SEED = 42

Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL...", help="GGUF files to score, also hf://ORG/REPO/FILE.gguf."),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference", "-r", help="The original: KLD token by token, or cosines of embeddings."
    ),
]
ReferenceLogits = Annotated[
    Path | None,
    typer.Option(
        "--reference-logits",
        "--kl-divergence-base",
        help="The reference's logits in a file of llama-perplexity or --save-logits.",
    ),
]
SaveLogits = Annotated[
    Path | None,
    typer.Option(
        "--save-logits",
        "--save-all-logits",
        help="Write the reference's logits (the model's, without one) for llama-perplexity.",
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="ram (default): 128 drawn sequences of 2048; warm (default with --corpus): these, each"
        " after BOS or the start of the chat template; llama: llama-perplexity's.",
    ),
]
SeqLen = Annotated[
    list[int] | None,
    typer.Option(
        "--seq-len",
        "--context",
        min=8,
        help="Tokens per sequence, repeatable; at most so many of a text to embed.",
    ),
]
NSeq = Annotated[
    int | None, typer.Option("--n-seq", min=1, help="Sequences to score, or texts to embed.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of the draw of sequences (ram, warm); default: 42."),
]
Bos = Annotated[bool, typer.Option("--bos", help="Start every sequence with BOS (ram).")]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="Text or parquet file to score instead of WikiText-2.")
]
CorpusNames = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        help="Texts by name, a table each and a pooled one: prose, code, math, chat, multilingual,"
        " long, wikitext or FILE; repeatable, or prose,code.",
    ),
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Dataset on the hub, NAME[:CONFIGURATION].")
]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Split of --dataset; default: test.")
]
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
Outlier = Annotated[
    float | None,
    typer.Option("--outlier", help="Sequence PPL above which it is one; default: 100."),
]
Where = Annotated[
    bool,
    typer.Option(
        "--where", help="Also KLD by position and class of token, and the worst tokens' text."
    ),
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print tables for a model card.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")]


def evaluate(
    models: Models,
    reference: Reference = None,
    reference_logits: ReferenceLogits = None,
    save_logits: SaveLogits = None,
    protocol: ProtocolOption = None,
    seq_len: SeqLen = None,
    n_seq: NSeq = None,
    seed: Seed = None,
    bos: Bos = False,
    corpus: CorpusNames = None,
    text: TextFile = None,
    dataset: Dataset = None,
    split: SplitOption = None,
    safe_kernels: Safe = None,
    output: Results = None,
    resume: Resume = False,
    outlier: Outlier = None,
    where: Where = False,
    threads: opt.Threads = None,
    workers: opt.Workers = None,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    as_csv: AsCsv = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Score models by llama.cpp on the CPU, sequence by sequence."""
    style = _Style(as_json, as_markdown, as_csv, where)
    terminal = opt.Terminal.make(quiet=quiet, as_json=style.for_programs)
    if split is not None and dataset is None:
        opt.refuse_idle(["--split"], "only with --dataset")
    if resume and output is None:
        opt.refuse_idle(["--resume"], "only with --output")
    if protocol == "llama":
        given = {"--seed": seed is not None, "--bos": bos}
        idle = [name for name, is_given in given.items() if is_given]
        opt.refuse_idle(idle, "the protocol llama takes all windows in order, BOS from the model")
    with connected(workers) as executor:
        found = api.evaluate(
            [terminal.fetched(model) for model in models],
            reference and terminal.fetched(reference),
            reference_logits=reference_logits,
            save_logits=save_logits,
            protocol=None if protocol is None else _protocol(protocol),
            n_ctx=seq_len,
            n_seq=n_seq,
            seed=_SEED if seed is None else seed,
            bos=bos,
            corpus=[name for part in corpus or () for name in part.split(",")],
            text=text,
            dataset=dataset,
            split=split or "test",
            safe_kernels=safe_kernels,
            jsonl=output,
            resume=resume,
            threads=threads,
            executor=executor,
            verbose=verbose,
            progress=terminal.progress,
        )
    if found.embeddings:
        _show_embeddings(found.embeddings, terminal, outlier, style)
    else:
        _show(found.results, terminal, outlier, style)
    for failure in found.failures:
        terminal.err.print(f"error: {failure}", soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Style:
    as_json: bool
    as_markdown: bool
    as_csv: bool
    where: bool

    def __post_init__(self) -> None:
        if self.as_json + self.as_markdown + self.as_csv > 1:
            raise typer.BadParameter("give one of --json, --markdown and --csv")
        if self.where and self.as_csv:
            raise typer.BadParameter("--csv has a row per model", param_hint="--where")

    @property
    def for_programs(self) -> bool:
        return self.as_json or self.as_markdown or self.as_csv


def _show(
    results: Sequence[EvalResult], terminal: opt.Terminal, outlier: float | None, style: _Style
) -> None:
    outlier = OUTLIER_PPL if outlier is None else outlier
    if style.as_json:
        print(eval_json(results, outlier_ppl=outlier))
    elif style.as_markdown:
        print(eval_markdown(results, outlier_ppl=outlier, where=style.where))
    elif style.as_csv:
        print(eval_csv(results, outlier_ppl=outlier), end="")
    else:
        print_eval(results, terminal.out, outlier_ppl=outlier, where=style.where)


def _show_embeddings(
    results: Sequence[EmbeddingResult], terminal: opt.Terminal, outlier: float | None, style: _Style
) -> None:
    if outlier is not None:
        terminal.announce("--outlier has no effect: embedding models have no PPL")
    if style.as_json:
        print(embeddings_json(results))
    elif style.as_markdown:
        print(embeddings_markdown(results), end="")
    elif style.as_csv:
        print(embeddings_csv(results), end="")
    else:
        print_embeddings(results, terminal.out)


ResultFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="RESULTS...",
        help="What `ramgguf eval` wrote (-o or --json), or published figures (.csv).",
    ),
]


def compare(
    files: ResultFiles,
    outlier: Outlier = None,
    where: Where = False,
    as_json: opt.AsJson = False,
    as_markdown: AsMarkdown = False,
    as_csv: AsCsv = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rank results by corpus, mean and median PPL and by KLD, and say where rankings differ."""
    style = _Style(as_json, as_markdown, as_csv, where)
    terminal = opt.Terminal.make(quiet=quiet, as_json=style.for_programs)
    material = read_material(files)
    if material.embeddings:
        if material.results or material.aggregates or material.trajectories:
            raise ResultError(
                "embedding models have no PPL or KLD and are not ranked together with language"
                " models; compare their files on their own"
            )
        _show_embeddings(material.embeddings, terminal, outlier, style)
        return
    if material.trajectories:
        print_trajectories(material.trajectories, terminal.out)
        if not material.results and not material.aggregates:
            return
    if material.aggregates and material.results:
        raise ResultError(
            "published figures have no sequences and are not ranked together with results;"
            " compare the CSV files on their own"
        )
    if material.aggregates:
        if outlier is not None:
            opt.refuse_idle(["--outlier"], "published figures have no sequences")
        if where:
            raise ResultError("--where: published figures have no tokens")
        _show_published(compare_published(material.aggregates, material.notes), terminal, style)
        return
    for domain in by_text(material.results):
        check_comparable(domain.results)
    _show(material.results, terminal, outlier, style)


def _show_published(board: Leaderboard, terminal: opt.Terminal, style: _Style) -> None:
    if style.as_json:
        print(board_json(board), end="")
    elif style.as_markdown:
        print(board_markdown(board), end="")
    elif style.as_csv:
        print(board_csv(board), end="")
    else:
        print_board(board, terminal.out)


PlanFiles = Annotated[list[Path] | None, typer.Option("--plan", help="A plan to draw; repeatable.")]
MeasurementFiles = Annotated[
    list[Path] | None, typer.Option("--measurement", help="Curves to draw; repeatable.")
]
Page = Annotated[Path, typer.Option("--output", "-o", help="The HTML page.")]
AnyFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILES...", help="Results of eval, published tables, plans and measurements."
    ),
]


def report(
    files: AnyFiles,
    output: Page = Path("report.html"),
    plan: PlanFiles = None,
    measurement: MeasurementFiles = None,
    outlier: Outlier = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Draw results, plans and curves on one HTML page that needs no network."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=False)
    opt.refuse_existing(output, force=force)
    material = read_material([*files, *(plan or ()), *(measurement or ())])
    if material.embeddings:
        raise ResultError(
            "the page shows PPL and KLD, which embedding models do not have; use `ramgguf compare`"
        )
    if outlier is not None and not material.results:
        opt.refuse_idle(["--outlier"], "there are no results of sequences")
    *domains, (_, made) = reports(material.results, OUTLIER_PPL if outlier is None else outlier)
    published = (
        compare_published(material.aggregates, material.notes) if material.aggregates else None
    )
    write_html(
        output,
        made,
        material.plans,
        material.measurements,
        published,
        domains=domains,
        trajectories=material.trajectories,
    )
    terminal.out.print(f"wrote {output} ({format_bytes(output.stat().st_size)})", soft_wrap=True)


def _protocol(name: str) -> ProtocolName:
    known: tuple[ProtocolName, ...] = get_args(ProtocolName)
    for each in known:
        if name == each:
            return each
    raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--protocol")
