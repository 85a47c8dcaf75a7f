"""Let llama.cpp load a model and go on with a prompt; exits 1 when it cannot.

    python tools/generate.py MODEL "The three primary colours are"

On some CPUs with AMX, llama.cpp crashes with its repacked kernels (ggml-org/llama.cpp issue 20824),
with anybody's files. Then it is run once more without them, as `--no-repack` does in its own tools.
"""

import argparse
import subprocess
import sys


def generate(model: str, prompt: str, n_tokens: int, *, repack: bool) -> str:
    """Return the greedy continuation of the prompt."""
    import llama_cpp.llama_cpp as low_level
    from llama_cpp import Llama

    parameters = low_level.llama_model_default_params()
    parameters.use_extra_bufts = repack
    low_level.llama_model_default_params = lambda: parameters  # Llama has no argument for it
    llama = Llama(model, n_ctx=256, verbose=False, seed=1)
    answer = llama.create_completion(prompt, max_tokens=n_tokens, temperature=0.0)
    return str(answer["choices"][0]["text"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--here", choices=["repacked", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        repack = arguments.here == "repacked"
        print(generate(arguments.model, arguments.prompt, arguments.tokens, repack=repack))
        return 0
    for kernels in ("repacked", "plain"):
        command = [sys.executable, __file__, arguments.model, arguments.prompt, "--here", kernels]
        command += ["--tokens", str(arguments.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            print(done.stdout.rstrip("\n"))
            return 0 if done.stdout.strip() else 1
        if done.returncode > 0:
            break
        print(f"llama.cpp crashed with {kernels} kernels (signal {-done.returncode})", flush=True)
    print(done.stderr[-500:], file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
