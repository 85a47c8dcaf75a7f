"""llama.cpp's own quantizer, called in a process of its own: the baseline of tests and benches."""

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType

# Mixes that llama.cpp makes with a matrix only.
NEED_MATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS"}
)
_kept: list[np.ndarray] = []  # what llama.cpp has pointers to


def quantize(
    source: Path,
    output: Path,
    file_type: str,
    *,
    token_embedding: str | None = None,
    tensor_types: Path | None = None,
    imatrix: Path | None = None,
    threads: int = 2,
) -> Path:
    """Write output with llama_model_quantize unless it is there; return it.

    file_type is a name of gguf.LlamaFileType without MOSTLY_ (IQ4_XS, Q4_K_M), token_embedding and
    the right sides of the tensor_types file are ggml type names; imatrix is a GGUF file of
    llama-imatrix's format, handed over as llama-quantize does. Raises RuntimeError when llama.cpp
    fails or crashes.
    """
    if output.exists():
        return output
    temporary = output.with_suffix(".tmp")
    command = [sys.executable, __file__, str(source), str(temporary), file_type, str(threads)]
    if token_embedding:
        command += ["--token-embedding", token_embedding]
    if tensor_types:
        command += ["--tensor-types", str(tensor_types)]
    if imatrix:
        command += ["--imatrix", str(imatrix)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        temporary.unlink(missing_ok=True)
        raise RuntimeError(f"llama_model_quantize {file_type}: {done.stderr[-500:]}")
    temporary.rename(output)
    return output


def dry_run(source: Path, file_type: str, token_embedding: str | None) -> str | None:
    """Return what llama.cpp says it would write, tensor by tensor; None if it fails."""
    command = [sys.executable, __file__, str(source), "/dev/null", file_type, "2", "--dry-run"]
    if token_embedding:
        command += ["--token-embedding", token_embedding]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr + done.stdout if done.returncode == 0 else None


def _imatrix(llama_cpp: Any, path: Path) -> Any:
    """Return the entries of the file as llama-quantize hands them over: means, by name."""
    tensors = {t.name: t.data for t in GGUFReader(path).tensors}
    names = [n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")]
    entries = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()  # ends without a name
    for entry, name in zip(entries, names, strict=False):
        means = np.ascontiguousarray(tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"])
        _kept.append(means)
        entry.name, entry.size = name.encode(), means.size
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("file_type")
    parser.add_argument("threads", type=int)
    parser.add_argument("--token-embedding")
    parser.add_argument("--tensor-types", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = LlamaFileType[f"MOSTLY_{arguments.file_type}"]
    parameters.nthread = arguments.threads
    parameters.dry_run = arguments.dry_run
    if arguments.token_embedding:
        parameters.token_embedding_type = GGMLQuantizationType[arguments.token_embedding]
    if arguments.tensor_types:
        lines = arguments.tensor_types.read_text().split()
        pairs = [line.partition("=") for line in lines]  # and lowered, as llama-quantize does
        # The array ends with an entry without a pattern.
        overrides = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))()
        for entry, (pattern, _, name) in zip(overrides, pairs, strict=False):
            entry.pattern = pattern.lower().encode()
            entry.type = GGMLQuantizationType[name.upper()]
        parameters.tt_overrides = ctypes.cast(
            overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override)
        )
    if arguments.imatrix:
        entries = _imatrix(llama_cpp, arguments.imatrix)
        count = llama_cpp.llama_model_kv_override()
        count.tag, count.key = (
            llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT,
            b"quantize.imatrix.entries_count",
        )
        count.value.val_i64 = len(entries) - 1
        keys = (llama_cpp.llama_model_kv_override * 2)(count)  # ends with an empty key
        parameters.imatrix = ctypes.cast(
            entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data)
        )
        parameters.kv_overrides = ctypes.cast(keys, type(parameters.kv_overrides))
    return int(
        llama_cpp.llama_model_quantize(
            arguments.source.encode(), arguments.output.encode(), ctypes.byref(parameters)
        )
    )


if __name__ == "__main__":
    sys.exit(_main())
