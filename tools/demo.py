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


def generate(model: Path) -> None:
    """Let llama.cpp load the file and go on with a sentence."""
    from llama_cpp import Llama

    print(f"\nllama.cpp loads {model} and goes on with a prompt:", flush=True)
    llama = Llama(str(model), n_ctx=256, verbose=False, seed=1)
    prompt = "The three primary colours are"
    answer = llama.create_completion(prompt, max_tokens=32, temperature=0.0)
    assert isinstance(answer, dict)
    text = answer["choices"][0]["text"]
    if not text.strip():
        sys.exit("demo: llama.cpp generated nothing")
    print(f"  {prompt}{text!s}".replace("\n", "\n  "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--n-seq", type=int, default=8, help="sequences of 2048 tokens to score")
    arguments = parser.parse_args()
    models: Path = arguments.models
    source, output = models / "smol768-f16.gguf", models / "smol768-104MB.gguf"

    run("python", str(TOOLS / "real_models.py"), "--out", str(models), "--only", "smol768-f16")
    run("ramgguf", "quantize", str(source), "--budget", BUDGET, "-o", str(output), "--force")
    generate(output)
    run(
        "ramgguf", "eval", str(output), "--reference", str(source),
        "--n-seq", str(arguments.n_seq),
    )  # fmt: skip
    print(f"\n{source}: {source.stat().st_size:,} bytes; {output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
