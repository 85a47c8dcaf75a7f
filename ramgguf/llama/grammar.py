"""The child process that tries one grammar, and ends: llama.cpp's parser may end with it.

llama-cpp-python 0.3.36 passes a grammar that llama.cpp refused on as a null pointer, which ends
the process that samples with it. Nested repetition and large counts take time and memory instead.
"""

import ctypes
import os
import resource
import sys
from types import ModuleType
from typing import Any

from ramgguf.llama.child import take_stdout
from ramgguf.llama.limits import cap_growth
from ramgguf.llama.server_protocol import CheckedGrammar, CheckGrammar
from ramgguf.llama.system import llama_module

GROWTH_BYTES = 512 << 20
CPU_SECONDS = 10  # should the parent be stopped
_LONGEST = 256 << 10  # bytes of a grammar


def load_vocabulary(llama: ModuleType, path: str) -> Any:
    """Return llama.cpp's vocabulary of the model in the file."""
    functions: Any = llama.llama_cpp
    parameters = functions.llama_model_default_params()
    parameters.vocab_only = True
    model = functions.llama_model_load_from_file(os.fsencode(path), parameters)
    return functions.llama_model_get_vocab(model)


def check(llama: ModuleType, vocab: Any, request: CheckGrammar) -> CheckedGrammar:
    """Parse the grammar and try it once on the whole vocabulary; return it, or what is wrong."""
    grammar = request.grammar
    if request.schema_text is not None:
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        try:
            grammar = json_schema_to_gbnf(request.schema_text)
        except Exception as e:  # it raises KeyError, AttributeError and others
            said = (str(e).splitlines() or [""])[0][:200]
            return CheckedGrammar(error=f"the schema makes no grammar ({type(e).__name__}: {said})")
    assert grammar is not None  # one of the two is there
    if len(grammar.encode("utf-8", "replace")) > _LONGEST:
        return CheckedGrammar(error=f"the grammar has more than {_LONGEST} bytes")
    functions: Any = llama.llama_cpp
    sampler = functions.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not sampler:
        return CheckedGrammar(error="llama.cpp cannot parse the grammar")
    n = functions.llama_vocab_n_tokens(vocab)
    candidates = (functions.llama_token_data * n)()
    for i in range(n):
        candidates[i].id = i
    array = functions.llama_token_data_array(candidates, n, -1, False)
    functions.llama_sampler_apply(sampler, ctypes.byref(array))
    return CheckedGrammar(grammar=grammar)


def main() -> None:
    """Answer the one line of stdin, after a line that says that the work begins."""
    out = take_stdout()
    request = CheckGrammar.model_validate_json(sys.stdin.readline())
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    llama = llama_module()
    vocab = load_vocabulary(llama, request.path)
    out.write("\n")
    out.flush()
    cap_growth(GROWTH_BYTES)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = check(llama, vocab, request)
    except (MemoryError, RecursionError) as e:
        answer = CheckedGrammar(error=f"the grammar takes too much ({type(e).__name__})")
    out.write(answer.model_dump_json() + "\n")
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
