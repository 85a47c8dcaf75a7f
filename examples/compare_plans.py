"""Does the objective matter? Two plans of one size, by different objectives, scored and compared.

    python examples/compare_plans.py model-f16.gguf --budget 4.5bpw --objectives weighted nmse

Needs the engine: pip install 'ramgguf[eval]'.
"""

import argparse
import sys
from pathlib import Path

import ramgguf
from ramgguf.core.errors import RamggufError


def compare(
    model: Path, folder: Path, budget: str, objectives: tuple[str, str], n_seq: int, n_ctx: int
) -> None:
    """Write a file by each objective, score both against the model, and say which is better."""
    # Both plans are made from the same curves: only what is minimised differs.
    measurement = ramgguf.measure(model)
    files = []
    for objective in objectives:
        plan = ramgguf.plan(measurement, budget, objective=objective)
        output = folder / f"{model.stem}-{objective}.gguf"
        made = ramgguf.quantize(model, from_plan=plan, output=output, force=True)
        files.append(made.paths[0])
        print(f"{made.paths[0].name}: {made.n_bytes:,} bytes, {plan.bpw:.3f} bpw")

    difference = ramgguf.diff(*files)
    print(f"{len(difference.changes)} tensors have another format, {difference.n_same} the same")

    # Sequence by sequence, against the unquantized model.
    scored = ramgguf.evaluate(files, reference=model, n_seq=n_seq, n_ctx=n_ctx)
    for failure in scored.failures:
        print(f"failed: {failure}")
    for result in scored.results:
        print(f"{result.model.label}: mean KLD {result.kld_mean:.5f} nats per token")

    # Rankings by several criteria; a tie is what resampling the text cannot tell apart.
    board = ramgguf.compare(scored)
    for ranking in board.rankings:
        print(f"by {ranking.criterion}: {' < '.join(ranking.order)}")
    for tie in board.ties:
        p = f", p = {tie.ratio.p:.2g}" if tie.ratio.p is not None else ""
        print(f"  {tie.criterion} does not tell {tie.better} and {tie.worse} apart{p}")


def main() -> int:
    """Read the command line; return the exit status: 0, or 1 for an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="GGUF model in F32, F16 or BF16")
    parser.add_argument("--folder", type=Path, help="for the two files; default: the model's")
    parser.add_argument("--budget", default="4.5bpw", help="16GB, 4.5bpw, 30%%")
    parser.add_argument("--objectives", nargs=2, default=["weighted", "nmse"], metavar="NAME")
    parser.add_argument("--n-seq", type=int, default=16, help="sequences to score")
    parser.add_argument("--n-ctx", type=int, default=512, help="tokens of each")
    asked = parser.parse_args()
    folder = asked.folder or asked.model.parent
    first, second = asked.objectives
    try:
        compare(asked.model, folder, asked.budget, (first, second), asked.n_seq, asked.n_ctx)
    except RamggufError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
