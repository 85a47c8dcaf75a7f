"""A run of the `ram` protocol: a model in F16, at Q8_0 and at budgets, with its HTML page.

    python bench/ram_run.py models/smol135-f16.gguf --name ram_smol135
    python bench/ram_run.py models/qwen05-f16.gguf --name ram_qwen05 --peer Q4_K_M \
        --seq-len 512 --n-seq 10 --corpus prose,code,chat

With --peer, the files are what `quantize` makes by effort auto at the bytes of llama.cpp's mix of
that name, and that mix with the importance matrix that auto made.

Writes bench/results/NAME.jsonl (one EvalResult per line, without per-token values) and NAME.html.
Sequences go to NAME.jsonl in the models' folder as they finish: an interrupted run, started again,
goes on. 128 sequences of 2048 tokens are 262,144 tokens per model.
"""

import argparse
import json
from pathlib import Path

import ramgguf
from effort import matrix_of
from llama_quantize import quantize as llama_quantize
from provenance import provenance
from ramgguf.evaluate.result import EvalResult
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.report.page import write_html
from ramgguf.report.results import reports

RESULTS = Path(__file__).parent / "results"


def contenders(
    source: Path, folder: Path, budgets: list[str], threads: int
) -> tuple[list[Path], list[tuple[str, Plan]], Measurement]:
    """Return the models (the source first), the plans of those at budgets, and the curves."""
    measurement = ramgguf.measure(source, threads=threads)
    q8_0 = llama_quantize(source, folder / f"{source.stem}-Q8_0.gguf", "Q8_0", threads=threads)
    models, plans = [source, q8_0], []
    for budget in budgets:
        output = folder / f"{source.stem}-{budget.rstrip('%')}pct.gguf"
        made = ramgguf.quantize(
            source, budget, output, measurement=measurement, force=True, threads=threads
        )
        models.append(output)
        plans.append((output.stem, made.plan))
    return models, plans, measurement


def against_peer(source: Path, folder: Path, mix: str, threads: int) -> list[Path]:
    """Return the source, llama.cpp's mix and ours at its bytes; files that are there are kept."""
    plain = llama_quantize(source, folder / f"{source.stem}-{mix}.gguf", mix, threads=threads)
    ours = folder / f"{source.stem}-{mix}-auto.gguf"
    if not ours.exists():
        ramgguf.quantize(source, plain.stat().st_size, ours, effort="auto", threads=threads)
    peer = folder / f"{source.stem}-{mix}-matrix.gguf"
    llama_quantize(source, peer, mix, imatrix=matrix_of(source), threads=threads)
    return [source, peer, ours]


def without_folders(result: EvalResult) -> EvalResult:
    """Return the result with the names of its files alone."""
    model = result.model.model_copy(update={"path": Path(result.model.path).name})
    reference = result.reference
    if reference is not None:
        reference = reference.model_copy(update={"path": Path(reference.path).name})
    return result.model_copy(update={"model": model, "reference": reference})


def record(result: EvalResult, origin: dict[str, str]) -> str:
    """Return a line of bench/results: the result without token values."""
    slim = json.loads(result.without_tokens().to_json())
    return json.dumps({**origin, "result": slim}, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--budgets", default="30%,35%,42%", help="of the source file's bytes")
    parser.add_argument("--peer", help="llama.cpp's mix to be compared with, instead of budgets")
    parser.add_argument("--n-seq", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--corpus", help="domains, as in eval; default: WikiText-2 test")
    parser.add_argument("--folder", type=Path, help="for the files; default: the source's")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    origin = {"bench": "ram_run", **provenance()}
    folder = options.folder or options.source.parent
    plans: list[tuple[str, Plan]] = []
    measurements: list[tuple[str, Measurement]] = []
    if options.peer:
        models = against_peer(options.source, folder, options.peer, options.threads)
    else:
        models, plans, measurement = contenders(
            options.source, folder, options.budgets.split(","), options.threads
        )
        measurements = [(options.source.stem, measurement)]
    found = ramgguf.evaluate(
        models,
        options.source,
        protocol="ram",
        corpus=options.corpus.split(",") if options.corpus else (),
        n_ctx=options.seq_len,
        n_seq=options.n_seq,
        threads=options.threads,
        jsonl=folder / f"{options.name}.jsonl",
        resume=True,
    )
    RESULTS.mkdir(exist_ok=True)
    results = [without_folders(result) for result in found.results]
    lines = [record(result, origin) for result in results]
    (RESULTS / f"{options.name}.jsonl").write_text("\n".join(lines) + "\n")
    page = RESULTS / f"{options.name}.html"
    *domains, (_, whole) = reports(results)
    write_html(page, whole, plans, measurements, domains=domains)
    print("\n".join([*found.failures, f"{len(results)} results; {page}"]))


if __name__ == "__main__":
    main()
