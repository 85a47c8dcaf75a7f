"""rtn against search, end to end: KLD and PPL of plans of equal bytes, at several budgets.

    python bench/encoder_quality.py models/smol768-f16.gguf --n-seq 12

Appends a line per file to bench/results/encoder_quality.jsonl.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import ramgguf
from provenance import provenance
from ramgguf.quants.encoders import EncoderName

BUDGETS_MB = (85, 104, 130, 160)
ENCODERS: tuple[EncoderName, ...] = ("rtn", "search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--n-seq", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("bench/results/encoder_quality.jsonl"))
    arguments = parser.parse_args()
    made: list[tuple[EncoderName, int, Path]] = []
    with tempfile.TemporaryDirectory(dir=arguments.source.parent) as folder:
        for encoder in ENCODERS:
            measured = ramgguf.measure(arguments.source, encoder=encoder)
            for megabytes in BUDGETS_MB:
                path = Path(folder) / f"{encoder}-{megabytes}MB.gguf"
                ramgguf.quantize(
                    arguments.source, megabytes * 10**6, path, measurement=measured, verify=False
                )
                made.append((encoder, megabytes, path))
        results = ramgguf.evaluate(
            [path for _, _, path in made], arguments.source, n_ctx=512, n_seq=arguments.n_seq
        ).results
    with arguments.out.open("a") as out:
        for (encoder, megabytes, _), result in zip(made, results, strict=True):
            losses = sum(s.nll_sum for s in result.sequences) / result.n_scored
            row = {
                "encoder": encoder,
                "budget": megabytes * 10**6,
                "n_bytes": result.model.n_bytes,
                "kld_mean": result.kld_mean,
                "corpus_ppl": math.exp(losses),
                "n_seq": arguments.n_seq,
                **provenance(),
            }
            print(row)
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
