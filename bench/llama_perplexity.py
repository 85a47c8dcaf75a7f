"""Our protocol `llama` and files of logits against llama-perplexity itself, both ways.

    python bench/llama_perplexity.py model-f16.gguf small.gguf --tool PATH/llama-perplexity \
        --text wiki.test.raw --chunks 8

The tool scores the model on the first chunks of a text and writes its --kl-divergence-base file;
then it scores the small model against that file, and against the one that `eval --save-logits`
wrote. We do the same, and read the tool's file. A table shows every statistic of each. Appends a
line per reader and file to bench/results/llama_perplexity.jsonl.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ramgguf
from provenance import provenance
from ramgguf.evaluate.statistics import STATISTICS
from ramgguf.evaluate.summary import losses

N_CTX = 512
# A line of the tool's summary: `Mean    KLD:   0.012345 ±   0.000678`, `99.9%   Δp:  1.2%`
_LINE = re.compile(r"^(.*?\S)\s*:\s*(-?[\d.]+)\s*%?(?:\s*±\s*[\d.]+\s*%?)?\s*$")
_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+)")


def tool_says(tool: Path, *arguments: str) -> dict[str, float]:
    """Run the tool; return what its summary says, by name (runs of spaces made one)."""
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if final := _FINAL.search(line):
            found["PPL"] = float(final[1])
        elif value := _LINE.match(line):
            found[" ".join(value[1].split())] = float(value[2])
    return found


def ours(model: Path, **options: Any) -> dict[str, float]:
    """Return the same of our own evaluation."""
    result = ramgguf.evaluate([model], protocol="llama", n_ctx=N_CTX, **options).results[0]
    found = {"PPL": STATISTICS["corpus_ppl"].of(losses(result))}
    table = result.as_llama_perplexity()
    if table is not None:
        for name, value in table.rows():
            found[" ".join(name.split())] = float(value.split()[0].rstrip("%"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--tool", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/llama_perplexity.jsonl"))
    options = parser.parse_args()
    size = ("-c", str(N_CTX), "--chunks", str(options.chunks), "-t", str(options.threads))
    mine = {"text": options.text, "n_seq": options.chunks, "threads": options.threads}
    rows: dict[str, Mapping[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        theirs, own = Path(folder) / "tool.kld", Path(folder) / "own.kld"
        base: tuple[str, ...] = ("--kl-divergence-base", str(theirs))
        rows["tool, original"] = tool_says(
            options.tool, "-m", str(options.model), "-f", str(options.text), *size, *base
        )
        rows["ramgguf, original"] = ours(options.model, save_logits=own, **mine)
        for file, made_by in ((theirs, "tool"), (own, "ramgguf")):
            base = ("--kl-divergence", "--kl-divergence-base", str(file))
            rows[f"tool, file of {made_by}"] = tool_says(
                options.tool, "-m", str(options.small), *size, *base
            )
            rows[f"ramgguf, file of {made_by}"] = ours(options.small, reference_logits=file, **mine)
    origin = provenance()
    with options.out.open("a") as out:
        for reader, found in rows.items():
            models = {"model": options.model.stem, "small": options.small.stem}
            out.write(json.dumps({**origin, **models, "reader": reader, "says": found}) + "\n")
    for name in dict.fromkeys(name for found in rows.values() for name in found):
        cells = [f"{found[name]:.6g}" if name in found else "" for found in rows.values()]
        if sum(map(bool, cells)) > 1:
            print(f"{name:40}", *(f"{cell:>14}" for cell in cells))
    print(f"{'':40}", *(f"{reader[:24]:>14}" for reader in rows), sep="\n")


if __name__ == "__main__":
    main()
