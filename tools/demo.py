"""The main job on a real model, end to end: `make demo` runs it."""

import argparse
import subprocess
import sys
from pathlib import Path

BUDGET = "104MB"
TOOLS = Path(__file__).resolve().parent


def run(*command: str) -> None:
    """Show a command and run it; the demo ends where one fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    status = subprocess.run(program, check=False).returncode
    if status != 0:
        sys.exit(f"demo: {command[0]} ended with status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--n-seq", type=int, default=8, help="sequences of 2048 tokens to score")
    arguments = parser.parse_args()
    models: Path = arguments.models
    source, output = models / "smol768-f16.gguf", models / "smol768-104MB.gguf"

    run("python", str(TOOLS / "real_models.py"), "--out", str(models), "--only", "smol768-f16")
    run("ramgguf", "quantize", str(source), "--budget", BUDGET, "-o", str(output), "--force",
        "--effort", "fast")  # fmt: skip
    run("python", str(TOOLS / "generate.py"), str(output), "The three primary colours are")
    run(
        "ramgguf", "eval", str(output), "--reference", str(source),
        "--n-seq", str(arguments.n_seq),
    )  # fmt: skip
    print(f"\n{source}: {source.stat().st_size:,} bytes; {output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
