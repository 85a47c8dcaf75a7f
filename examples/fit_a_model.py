"""Fit a model to a budget and prove that it runs: measure, curve, plan, quantize, check.

    python examples/fit_a_model.py model-f16.gguf --budget 4.5bpw --memory 16GB --context 4096

Needs the engine for the last step: pip install 'ramgguf[eval]'.
"""

import argparse
import sys
from pathlib import Path

import ramgguf
from ramgguf.core.errors import RamggufError


def fit(model: Path, output: Path, budget: str, memory: str | None, context: int) -> bool:
    """Write the best file of at most the budget, and return whether it passes its check."""
    # What every tensor would cost and lose in every format: the expensive step, made once.
    measurement = ramgguf.measure(model)
    measurement.save(output.with_suffix(".rd.json"))

    # The best plans of all sizes. Knees are where more bytes begin to buy less.
    frontier = ramgguf.curve(measurement)
    smallest, largest = frontier.start_bytes, frontier.end_bytes
    print(f"{len(frontier.steps) + 1} optimal plans from {smallest:,} to {largest:,} bytes")
    for knee in frontier.knees:
        step = frontier.steps[knee]
        print(f"  knee at {step.n_bytes:,} bytes, {frontier.bpw(step.n_bytes):.2f} bpw")

    # The plan of this size, proven to be within plan.gap of the optimum.
    plan = ramgguf.plan(measurement, budget)
    print(
        f"plan: {plan.n_bytes:,} of {plan.budget:,} bytes, {plan.bpw:.2f} bpw, gap {plan.gap:.1g}"
    )

    made = ramgguf.quantize(model, from_plan=plan, output=output, force=True)
    print(f"wrote {made.paths[0]}: {made.n_bytes:,} bytes")

    # A fresh process of llama.cpp loads it, fills the context, is timed and asked.
    result = ramgguf.check(made.paths[0], memory, context)
    if not result.passed:
        print(f"it fails: {'; '.join(result.failures)}")
        for change in result.advice:
            print(f"  change: {change}")
        return False
    print(f"it runs, with {result.margin or 0:,} bytes to spare")
    if result.speed is not None and result.speed.generation is not None:
        print(f"  {result.speed.generation.median:.1f} tokens/s on {result.n_threads} threads")
    return True


def main() -> int:
    """Read the command line; return the exit status: 0 passed, 3 failed, 1 an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="GGUF model in F32, F16 or BF16")
    parser.add_argument("--output", type=Path, help="default: MODEL-fit.gguf")
    parser.add_argument("--budget", default="4.5bpw", help="16GB, 4.5bpw, 30%%")
    parser.add_argument("--memory", help="what it must run in; default: what is left here")
    parser.add_argument("--context", type=int, default=4096, help="tokens")
    asked = parser.parse_args()
    output = asked.output or asked.model.with_name(f"{asked.model.stem}-fit.gguf")
    try:
        passed = fit(asked.model, output, asked.budget, asked.memory, asked.context)
    except RamggufError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0 if passed else 3


if __name__ == "__main__":
    sys.exit(main())
