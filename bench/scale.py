"""What a model of 671 B weights takes: bytes, passes and hours, from figures in bench/results.

    python bench/scale.py

prints the tables of docs/scale.md. The shape is DeepSeek-V3's, as its published configuration says.
Nothing here is a measurement of such a model: every figure is one of a small model, multiplied.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.llama.model import chunk_size

# Recorded: 211 tensors of smol768 (189 M weights, F16) read with 512 tokens each took 526 s of CPU
# time on one thread of an Intel Xeon (Sapphire Rapids) that was busy with other work.
FLOP_PER_THREAD_SECOND = 78e9

RESULTS = Path(__file__).parent / "results"

# A worker, assumed: a server with two sockets of today. Only bytes and rates of it are used.
THREADS, MEMORY_RATE, DISK_RATE = 64, 200e9, 7e9

WIDTH, N_LAYERS, N_DENSE, N_VOCAB = 7168, 61, 3, 129_280
N_EXPERTS, N_USED, EXPERT_WIDTH, DENSE_WIDTH = 256, 8, 2048, 18_432
HEADS, QUERY_RANK, KEY_RANK, HEAD, ROPE = 128, 1536, 512, 128, 64

N_SEQUENCES, N_CTX = 4, 512  # sensitivity's own
EVAL_SEQUENCES, EVAL_CTX = 128, 2048  # the protocol ram
TRIALS, SIZES = 32, (2, 2, 4)  # refinement's
CANDIDATE_BPW = 4.5


@dataclass(frozen=True)
class Tensor:
    """A weight that can be quantized; share is of its weights that a token multiplies with."""

    n_weights: int
    share: float = 1.0


def tensors() -> Iterator[Tensor]:
    """Yield the weights of the model; norms, routers and biases are too small to count."""
    yield Tensor(N_VOCAB * WIDTH, share=0.0)  # the embedding is looked up
    yield Tensor(N_VOCAB * WIDTH)
    for layer in range(N_LAYERS):
        yield Tensor(WIDTH * QUERY_RANK)
        yield Tensor(QUERY_RANK * HEADS * (HEAD + ROPE))
        yield Tensor(WIDTH * (KEY_RANK + ROPE))
        yield Tensor(KEY_RANK * HEADS * 2 * HEAD)
        yield Tensor(HEADS * HEAD * WIDTH)
        for _ in range(3):
            if layer < N_DENSE:
                yield Tensor(WIDTH * DENSE_WIDTH)
            else:
                yield Tensor(WIDTH * EXPERT_WIDTH)  # the shared expert
                yield Tensor(WIDTH * EXPERT_WIDTH * N_EXPERTS, share=N_USED / N_EXPERTS)


def rows(name: str) -> list[dict[str, object]]:
    """Return the rows of a file of results."""
    text = (RESULTS / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def number(value: object) -> float:
    """Return a field that is a number."""
    return float(str(value))


ALL = tuple(tensors())
N_WEIGHTS = sum(t.n_weights for t in ALL)
N_ACTIVE = sum(t.n_weights * t.share for t in ALL)
LARGEST = max(t.n_weights for t in ALL)


def pass_seconds(n_tokens: int, n_bytes: float, rate: float) -> float:
    """Return how long a pass takes: computing, or reading the weights once per chunk."""
    n_chunks = -(-n_tokens // chunk_size(n_tokens, N_VOCAB))
    computing = 2 * N_ACTIVE * n_tokens / (FLOP_PER_THREAD_SECOND * THREADS)
    return max(computing, n_chunks * n_bytes / rate)


def exchange_seconds() -> float:
    """Return how long all tensors take to be encoded, written to the copy and restored."""
    encoding = N_WEIGHTS / (encode_rate() * THREADS)
    return encoding + 4 * 2 * N_WEIGHTS / DISK_RATE  # read, written, read, written


def encode_rate() -> float:
    """Return weights per second of one thread that encodes Q4_K with search, AVX-512."""
    for row in rows("kernels"):
        wanted = ("encode", "Q4_K", "search", "v4")
        if (row["operation"], row["format"], row["encoder"], row["isa"]) == wanted:
            return number(row["weights_per_second"])
    raise SystemExit("bench/results/kernels.jsonl has no encoding of Q4_K with search")


def bytes_table() -> Iterator[Sequence[str]]:
    """Yield what the model takes on disk and in memory."""
    source = 2 * N_WEIGHTS
    yield "what", "bytes"
    yield "", ""
    fp8 = N_WEIGHTS * (1 + 4 / 128**2)
    yield "as published, FP8 with a scale for 128 × 128 weights", tera(fp8)
    yield "as GGUF in BF16 or F16: what ramgguf reads", tera(source)
    yield f"quantized to {CANDIDATE_BPW} bits per weight", tera(CANDIDATE_BPW / 8 * N_WEIGHTS)
    yield (
        "disk of a worker for sensitivity or refinement: its copy, besides the source",
        tera(source),
    )
    yield "page cache for passes at the speed of memory: the copy", tera(source)
    yield "largest tensor (experts of a layer), in memory while it is exchanged", giga(2 * LARGEST)
    logits = 4 * N_CTX * N_VOCAB
    yield f"logits of the original, {N_SEQUENCES} sequences of {N_CTX}", giga(logits * N_SEQUENCES)


def hours_table() -> Iterator[Sequence[str]]:
    """Yield stages, their passes and the hours that they take."""
    source, small = 2 * N_WEIGHTS, CANDIDATE_BPW / 8 * N_WEIGHTS
    yield "stage", "passes", "s each", "1 worker", "8 workers", "32 workers", "from disk, 8"
    yield ("",) * 7
    one, slow = (pass_seconds(N_CTX, source, rate) for rate in (MEMORY_RATE, DISK_RATE))
    n = N_SEQUENCES * len(ALL)
    fixed = 2 * N_SEQUENCES  # each worker's own: the original's logits, and the timing
    work = [exchange_seconds() / n_workers for n_workers in (1, 8, 32)]
    times = [one * (n / w + fixed) + x for w, x in zip((1, 8, 32), work, strict=True)]
    name = f"sensitivity, {len(ALL)} tensors × {N_SEQUENCES} sequences"
    yield name, f"{n:,}", f"{one:.0f}", *map(hours, times), hours(slow * (n / 8 + fixed) + work[1])
    pair = [
        pass_seconds(EVAL_CTX, source, rate) + pass_seconds(EVAL_CTX, small, rate)
        for rate in (MEMORY_RATE, DISK_RATE)
    ]
    times = [pair[0] * math.ceil(EVAL_SEQUENCES / w) for w in (1, 8, 32)]
    from_disk = hours(pair[1] * math.ceil(EVAL_SEQUENCES / 8))
    name = f"eval, original and one candidate, {EVAL_SEQUENCES} × {EVAL_CTX} tokens"
    yield name, f"{2 * EVAL_SEQUENCES}", f"{pair[0] / 2:.0f}", *map(hours, times), from_disk
    n = TRIALS * (SIZES[0] + SIZES[1]) + 3 * sum(SIZES)
    # The passes of a trial run side by side, one trial after the other.
    wide = 2 * TRIALS + 3 * sum(SIZES) / 8
    filling = exchange_seconds() / 2
    times = [one * passes + filling for passes in (n, wide, wide)]
    name = f"refinement, {TRIALS} trials, at most"
    yield name, f"{n}", f"{one:.0f}", *map(hours, times), hours(slow * wide + filling)


def quantizing_table() -> Iterator[Sequence[str]]:
    """Yield what measuring, writing and verifying take on one machine."""
    machines = f"{THREADS} threads", "2 threads, as measured"
    yield "encoder", "measured on", "CPU s per G weights", *machines
    yield ("",) * 5
    # Measured, written and verified: the source is read three times, from the disk assumed.
    reading = 3 * 2 * N_WEIGHTS / DISK_RATE
    size = max(rows("size"), key=lambda row: number(row["n_weights"]))
    per = number(size["cpu_seconds"]) / number(size["n_weights"])
    giga_weights = f"{number(size['n_weights']) / 1e9:.1f} G weights, `size.jsonl`"
    busy = hours(max(per * N_WEIGHTS / THREADS, reading))
    # Its disk, at 0.64 GB/s, was what that run waited for.
    wall = hours(number(size["seconds"]) / number(size["n_weights"]) * N_WEIGHTS)
    yield "rtn", giga_weights, f"{1e9 * per:.1f}", busy, f"{wall}, from disk"
    found = [
        row
        for row in rows("quantize")
        if (row["tool"], row["encoder"], row["formats"]) == ("ramgguf", "search", "planned")
    ]
    large = max(found, key=lambda row: number(row["n_weights"]))
    per = number(large["cpu_seconds"]) / number(large["n_weights"])
    giga_weights = f"{number(large['n_weights']) / 1e9:.1f} G weights, `quantize.jsonl`"
    busy = hours(max(per * N_WEIGHTS / THREADS, reading))
    wall = hours(number(large["seconds"]) / number(large["n_weights"]) * N_WEIGHTS)
    yield "search", giga_weights, f"{1e9 * per:.1f}", busy, f"{wall}, source in memory"


def tera(n_bytes: float) -> str:
    return f"{n_bytes / 1e12:.3f} TB"


def giga(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def markdown(table: Iterator[Sequence[str]]) -> str:
    """Return the table; its second row is the rule."""
    lines = [list(row) for row in table]
    lines[1] = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text() -> str:
    """Return all tables."""
    summary = (
        f"{N_WEIGHTS / 1e9:.1f} G weights in {len(ALL)} tensors that can be quantized, "
        f"{N_ACTIVE / 1e9:.1f} G of them multiplied with a token; chunks of "
        f"{chunk_size(N_CTX, N_VOCAB)} tokens"
    )
    made = (bytes_table(), hours_table(), quantizing_table())
    return "\n\n".join([summary, *(markdown(table) for table in made)])


if __name__ == "__main__":
    print(text())
