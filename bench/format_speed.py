"""Tokens per second of a model uniform in each format, prompt and generation, through llama.cpp.

    python bench/format_speed.py models/smol768-f16.gguf --files models/uniform --prepare
    python bench/format_speed.py models/smol768-f16.gguf --files models/uniform

The first line makes the files, the second times them: all models are loaded at once, and every
round times each of them, so that other load on the machine affects all alike. Rows with medians and
ranges over the rounds are added to bench/results/format_speed.jsonl. Seconds are the process's CPU
time on one thread, which a busy machine disturbs less than the clock.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ramgguf
from provenance import provenance
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.system import system_info
from ramgguf.quants import formats

N_PROMPT, N_GENERATED = 128, 8


def prepare(source: Path, folder: Path) -> None:
    """Write the source uniform in every format that its rows allow."""
    folder.mkdir(parents=True, exist_ok=True)
    measurement = ramgguf.measure(source, encoder="rtn", formats=formats.quantized())
    for name in formats.quantized():
        path = folder / f"{source.stem}-{name}.gguf"
        if not path.exists():
            plan = ramgguf.plan(measurement, "1000%", pins=[f".={name}"])
            ramgguf.quantize(source, from_plan=plan, output=path, verify=False)


def prompt_seconds(model: LlamaModel, ids: NDArray[np.int32]) -> float:
    """Return how long a prompt takes, to the logits of its last token."""
    model.clear()
    start = time.process_time()
    for a, b in model.chunks(len(ids)):
        model.decode(ids[a:b], first_output=b - a - 1)
    return time.process_time() - start


def generation_seconds(model: LlamaModel, ids: NDArray[np.int32]) -> float:
    """Return how long each of N_GENERATED tokens after the prompt takes."""
    start = time.process_time()
    for i in range(N_GENERATED):
        model.decode(ids[i : i + 1])
    return (time.process_time() - start) / N_GENERATED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--files", type=Path, default=Path("models/uniform"))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=400, help="no new round after these")
    parser.add_argument("--out", type=Path, default=Path("bench/results/format_speed.jsonl"))
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.source, arguments.files)
        return
    began = time.perf_counter()
    paths = {"F16": arguments.source}
    for name in formats.quantized():
        path = arguments.files / f"{arguments.source.stem}-{name}.gguf"
        if path.exists():
            paths[name] = path
    prompt: dict[str, list[float]] = {name: [] for name in paths}
    generation: dict[str, list[float]] = {name: [] for name in paths}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(LlamaModel(path, n_ctx=N_PROMPT + N_GENERATED, n_threads=1))
            for name, path in paths.items()
        }
        n_vocab = next(iter(models.values())).vocab.n_tokens
        ids = np.random.default_rng(0).integers(n_vocab, size=N_PROMPT, dtype=np.int32)
        for model in models.values():
            prompt_seconds(model, ids[:16])  # to warm up
        for k in range(arguments.rounds):
            if k and time.perf_counter() - began > arguments.seconds:
                break
            for name, model in models.items():
                prompt[name].append(N_PROMPT / prompt_seconds(model, ids))
                generation[name].append(1 / generation_seconds(model, ids))
    with arguments.out.open("a") as out:
        for name, path in paths.items():
            row = {
                "bench": "format_speed",
                "model": arguments.source.stem,
                "format": name,
                "n_bytes": path.stat().st_size,
                "threads": 1,
                "n_prompt": N_PROMPT,
                "rounds": len(prompt[name]),
                "prompt_tokens_per_s": round(statistics.median(prompt[name]), 1),
                "prompt_range": [round(min(prompt[name]), 1), round(max(prompt[name]), 1)],
                "generated_tokens_per_s": round(statistics.median(generation[name]), 1),
                "generated_range": [
                    round(min(generation[name]), 1),
                    round(max(generation[name]), 1),
                ],
                "engine": system_info().build,
                **provenance(),
            }
            print(json.dumps(row), flush=True)
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
