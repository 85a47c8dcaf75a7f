"""A run of the `ram` protocol: a model in F16, at Q8_0 and at budgets, with its HTML page.

    python bench/ram_run.py models/smol135-f16.gguf --name ram_smol135

Writes bench/results/NAME.jsonl (one EvalResult per line, without per-token values) and NAME.html.
Sequences go to NAME.jsonl in the models' folder as they finish: an interrupted run, started again,
goes on. 128 sequences of 2048 tokens are 262,144 tokens per model.
"""

import argparse
import json
from pathlib import Path

import ramgguf
from llama_quantize import quantize as llama_quantize
from provenance import provenance
from ramgguf.evaluate.result import EvalResult
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.report.page import write_html
from ramgguf.report.results import report_of

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


def record(result: EvalResult, origin: dict[str, str]) -> str:
    """Return a line of bench/results: the result without token values and folders."""
    slim = result.without_tokens()
    model = slim.model.model_copy(update={"path": Path(slim.model.path).name})
    slim = slim.model_copy(update={"model": model})
    if slim.reference is not None:
        name = Path(slim.reference.path).name
        reference = slim.reference.model_copy(update={"path": name})
        slim = slim.model_copy(update={"reference": reference})
    return json.dumps({**origin, "result": json.loads(slim.to_json())}, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--budgets", default="30%,35%,42%", help="of the source file's bytes")
    parser.add_argument("--n-seq", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    origin = {"bench": "ram_run", **provenance()}
    folder = options.source.parent
    models, plans, measurement = contenders(
        options.source, folder, options.budgets.split(","), options.threads
    )
    found = ramgguf.evaluate(
        models,
        options.source,
        n_ctx=options.seq_len,
        n_seq=options.n_seq,
        threads=options.threads,
        jsonl=folder / f"{options.name}.jsonl",
        resume=True,
    )
    RESULTS.mkdir(exist_ok=True)
    lines = [record(result, origin) for result in found.results]
    (RESULTS / f"{options.name}.jsonl").write_text("\n".join(lines) + "\n")
    page = RESULTS / f"{options.name}.html"
    write_html(page, report_of(found.results), plans, [(options.source.stem, measurement)])
    print("\n".join([*found.failures, f"{len(found.results)} results; {page}"]))


if __name__ == "__main__":
    main()
