"""From a file in a scratch folder to the output: verified, then renamed, or written as shards."""

import os
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import put_in_place, refuse_existing
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan.result import Plan
from ramgguf.quantize.output_paths import default_output, shards_of
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, as_planned, quantize_once
from ramgguf.quantize.verify import verify as verify_file


def placed(
    model: Path, made: Quantized, output: Path | None, options: QuantizeOptions
) -> Quantized:
    """Return what was made, under its final name, by default that of its plan, with a number where
    that is taken.

    Raises GGUFError, nothing changed, where the output exists and may not be replaced.
    """
    path = output or free_output(model, made.plan, options)
    if options.splits:
        copied = replace(options, before=made)  # error feedback is not done again
        again = quantize_once(model, None, path, copied, from_plan=made.plan)
        return replace(again, measurement=made.measurement, score=made.score)
    refuse_existing(path, force=options.force, error=GGUFError)
    worst = verified(model, made, options) if options.verify else None
    put_in_place(made.paths[0], path, force=options.force, error=GGUFError)
    return replace(made, paths=(path,), worst_departure=worst)


def free_output(model: Path, plan: Plan, options: QuantizeOptions) -> Path:
    """Return the default name of the plan's output, with a number where that is taken and may not
    be replaced: what took hours to make is not refused for its name.
    """
    first = default_output(model, plan)
    if options.force:
        return first
    names = chain([first], (first.with_stem(f"{first.stem}-{n}") for n in count(2)))
    return next(path for path in names if not os.path.lexists(path) and not shards_of(path))


def verified(model: Path, made: Quantized, options: QuantizeOptions) -> float:
    """Return the largest relative difference between planned and written NMSE."""
    threads, shown = options.threads or default_threads(), options.progress or Silent()
    with open_gguf(model) as plain, open_gguf(made.paths[0]) as written:
        file = as_planned(plain, made.plan)
        return verify_file(file, made.plan, written, threads=threads, progress=shown)
