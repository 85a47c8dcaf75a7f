"""From a file in a scratch folder to the output: verified, then renamed, or written as shards."""

from dataclasses import replace
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import put_in_place, refuse_existing
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.quantize.output_paths import free_output
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, as_planned, quantize_once
from ramgguf.quantize.verify import verify as verify_file


def placed(
    model: Path, made: Quantized, output: Path | None, options: QuantizeOptions
) -> Quantized:
    """Return what was made, under its final name, by default that of its plan, with a number where
    that is taken.

    Raises GGUFError, nothing changed, where the output exists and may not be replaced.
    """
    path = output or free_output(model, made.plan, force=options.force)
    if options.splits:
        copied = replace(options, before=made)  # error feedback is not done again
        again = quantize_once(model, None, path, copied, from_plan=made.plan)
        return replace(again, measurement=made.measurement, score=made.score)
    refuse_existing(path, force=options.force, error=GGUFError)
    worst = verified(model, made, options) if options.verify else None
    put_in_place(made.paths[0], path, force=options.force, error=GGUFError)
    return replace(made, paths=(path,), worst_departure=worst)


def verified(model: Path, made: Quantized, options: QuantizeOptions) -> float:
    """Return the largest relative difference between planned and written NMSE."""
    threads, shown = options.threads or default_threads(), options.progress or Silent()
    with open_gguf(model) as plain, open_gguf(made.paths[0]) as written:
        file = as_planned(plain, made.plan)
        return verify_file(file, made.plan, written, threads=threads, progress=shown)
