"""llama.cpp with its best flags: every ftype × token-embedding type near a size, by KLD.

    python bench/best_flags.py models/smol768-f16.gguf --bytes 104000000 --out bench/results

Candidates come from llama.cpp's dry run; those near the bytes are made and scored.
"""

import argparse
import json
from pathlib import Path

import ramgguf
from baselines import LEAST, all_flags, near
from llama_quantize import quantize
from provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--models", type=Path, default=Path("models/llama"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--least", type=float, default=LEAST)
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="files to score beside")
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--list", action="store_true", help="only list the candidates")
    arguments = parser.parse_args()
    arguments.models.mkdir(parents=True, exist_ok=True)
    choices = all_flags(arguments.source, arguments.models)
    found = near(choices, arguments.bytes, arguments.least)
    candidates = sorted(found, key=lambda f: -f.n_bytes)
    for flags in candidates:
        print(f"{flags.label:18} {flags.n_bytes:,}", flush=True)
    if arguments.list:
        return
    files = [*arguments.ours]
    for flags in candidates:
        path = quantize(
            arguments.source,
            arguments.models / f"{arguments.source.stem}-{flags.label}.gguf",
            flags.file_type,
            token_embedding=flags.embedding,
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
