"""llama.cpp with its best flags: every ftype × token-embedding type near a size, by KLD.

    python bench/best_flags.py models/smol768-f16.gguf --bytes 104000000 --out bench/results

Candidates come from llama.cpp's dry run; those near the bytes are made and scored.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ramgguf
from llama_quantize import planned_mib, quantize
from provenance import provenance

# The ftypes and embedding types that need no importance matrix.
FILE_TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)
EMBEDDINGS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("IQ3_S", "IQ4_NL", "IQ4_XS"),
)


def near(
    source: Path, n_bytes: int, least: float = 0.93, file_types: Sequence[str] = FILE_TYPES
) -> list[tuple[str, str | None, float]]:
    """Return (ftype, embedding type, MiB of data) whose data take `least` to 1 of the bytes."""
    pairs = [(f, e) for f in file_types for e in (None, *EMBEDDINGS)]
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda pair: planned_mib(source, *pair), pairs))
    found = [
        (*pair, mib)
        for pair, mib in zip(pairs, sizes, strict=True)
        if mib is not None and least * n_bytes < mib * 2**20 <= n_bytes
    ]
    return sorted(found, key=lambda f: -f[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--models", type=Path, default=Path("models/llama"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--least", type=float, default=0.93)
    parser.add_argument("--file-types", default=",".join(FILE_TYPES))
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="files to score beside")
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--list", action="store_true", help="only list the candidates")
    arguments = parser.parse_args()
    arguments.models.mkdir(parents=True, exist_ok=True)
    file_types = arguments.file_types.split(",")
    candidates = near(arguments.source, arguments.bytes, arguments.least, file_types)
    for file_type, embedding, mib in candidates:
        print(f"{file_type:8} embedding {embedding or 'default':8} {mib:8.2f} MiB", flush=True)
    if arguments.list:
        return
    files = [*arguments.ours]
    for file_type, embedding, _ in candidates:
        name = f"{arguments.source.stem}-{file_type}-{embedding or 'default'}.gguf"
        path = quantize(
            arguments.source, arguments.models / name, file_type, token_embedding=embedding
        )
        if path.stat().st_size <= arguments.bytes:
            files.append(path)
    results = ramgguf.evaluate(files, arguments.source, n_ctx=512, n_seq=arguments.n_seq).results
    with (arguments.out / "best_flags.jsonl").open("a") as out:
        for result in sorted(results, key=lambda r: r.kld_mean):
            row = {
                "file": result.model.label,
                "n_bytes": result.model.n_bytes,
                "kld_mean": result.kld_mean,
                "n_seq": arguments.n_seq,
                **provenance(),
            }
            print(row)
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
