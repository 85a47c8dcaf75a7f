"""A small checkpoint as transformers saves it: real safetensors and tokenizer files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.safetensors import read_header

WIDTH, FEED_FORWARD, N_HEADS = 64, 128, 2
Stored = dict[str, tuple[str, NDArray[np.generic]]]  # by name: the dtype, and values or bits
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1", "I32": "<i4"}


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of values that are cut off to BF16, not rounded."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values that bits stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, NDArray[np.generic]]]) -> None:
    """Write tensors, each with the name of its dtype; BF16 are bits."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        stored = np.ascontiguousarray(values, _STORED[dtype]).tobytes()
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _tokenizer() -> tuple[dict[str, object], int]:
    """Return a tokenizer.json of Llama's kind, which knows bytes and little else."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "▁t"]
    added = [
        {"id": i, "content": vocabulary[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in range(3)
    ]  # fmt: skip
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": ["▁ t"],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }, len(vocabulary)  # fmt: skip


def write_checkpoint(
    folder: Path, *, dtype: str = "BF16", n_layers: int = 2, seed: int = 0, n_files: int = 1
) -> Path:
    """Write a Llama model with random weights into the folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tokenizer, n_vocab = _tokenizer()
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        stored: NDArray[np.generic] = bf16(values) if dtype == "BF16" else values
        tensors[f"{name}.weight"] = (dtype, stored)

    add("model.embed_tokens", n_vocab, WIDTH)
    for layer in range(n_layers):
        block = f"model.layers.{layer}."
        add(block + "input_layernorm", WIDTH)
        add(block + "post_attention_layernorm", WIDTH)
        for part in "qkvo":
            add(block + f"self_attn.{part}_proj", WIDTH, WIDTH)
        add(block + "mlp.gate_proj", FEED_FORWARD, WIDTH)
        add(block + "mlp.up_proj", FEED_FORWARD, WIDTH)
        add(block + "mlp.down_proj", WIDTH, FEED_FORWARD)
    add("model.norm", WIDTH)
    add("lm_head", n_vocab, WIDTH)
    names = list(tensors)
    if n_files == 1:
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        weight_map: dict[str, str] = {}
        for k in range(n_files):
            part = f"model-{k + 1:05d}-of-{n_files:05d}.safetensors"
            write_safetensors(folder / part, {n: tensors[n] for n in names[k::n_files]})
            weight_map |= dict.fromkeys(names[k::n_files], part)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": n_vocab,
        "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD, "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS, "num_key_value_heads": N_HEADS,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16"}.get(dtype, "float32"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def quantized_again(
    folder: Path, ending: str, said: Mapping[str, object], parts: Callable[[str], Stored]
) -> None:
    """Put other tensors in the place of a checkpoint's weights whose module has this ending.

    said is the quantization_config, parts returns the tensors of a module.
    """
    path = folder / "model.safetensors"
    tensors: Stored = {}
    for name, tensor in read_header(path).items():
        module = name.removesuffix(".weight")
        values = np.array(tensor.values())
        tensors |= parts(module) if module.endswith(ending) else {name: (tensor.dtype, values)}
    write_safetensors(path, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(said)}))


def write_peft_adapter(
    folder: Path, factors: dict[str, tuple[int, int]], **config: object
) -> dict[str, NDArray[np.float32]]:
    """Write an adapter of modules with these outputs and inputs; return its tensors."""
    folder.mkdir()
    rng, rank = np.random.default_rng(7), 4
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {}
    for module, (n_out, n_in) in factors.items():
        for which, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = rng.standard_normal(shape, dtype=np.float32)
            tensors[f"base_model.model.{module}.lora_{which}.weight"] = ("F32", values)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return {name: np.asarray(values, np.float32) for name, (_, values) in tensors.items()}
