"""Adapters in GGUF: merged into models as llama.cpp applies them, refused by name otherwise."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.core.errors import CheckpointError, RamggufError
from ramgguf.gguf.conversion import converted_folder
from ramgguf.gguf.hub import beside, local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from small_checkpoint import write_checkpoint, write_peft_adapter
from small_models import ARCHITECTURES, write_small_model
from tiny_models import FEED_FORWARD, WIDTH, write_tiny_model

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
Q, DOWN, EMBED = "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"
N_VOCAB, RANK, ALPHA = 260, 4, 6.0
SHAPES = {Q: (WIDTH, WIDTH), DOWN: (WIDTH, FEED_FORWARD), EMBED: (N_VOCAB, WIDTH)}
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def factors(shapes: Mapping[str, tuple[int, ...]], seed: int = 7, rank: int = RANK) -> Arrays:
    """Return A and B for tensors of these shapes (outputs, inputs), small beside the weights."""
    rng = np.random.default_rng(seed)
    found: Arrays = {}
    for name, (*experts, n_out, n_in) in shapes.items():
        a, b = (*experts, rank, n_in), (*experts, n_out, rank)
        if name == EMBED:  # a row of A for each token
            a, b = (n_out, rank), (n_in, rank)
        for end, shape in ((".lora_a", a), (".lora_b", b)):
            found[name + end] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
    return found


def write_adapter(
    path: Path,
    tensors: Arrays,
    *,
    arch: str = "llama",
    kind: str = "adapter",
    method: str = "lora",
    alpha: float | None = ALPHA,
    stored: str = "F32",
    extra: Mapping[str, list[int]] | None = None,
) -> Path:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does."""
    out = gguf.GGUFWriter(path, arch)
    out.add_type(kind)
    out.add_string("adapter.type", method)
    if alpha is not None:
        out.add_float32("adapter.lora.alpha", alpha)
    for key, value in (extra or {}).items():
        out.add_array(key, value)
    wanted = gguf.GGMLQuantizationType[stored]
    for name, array in tensors.items():
        out.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    finish_gguf(out)
    return path


def weights(file: GGUFFile, name: str) -> NDArray[np.float64]:
    tensor = file.tensor(name)
    rows = file.read_rows(tensor, 0, tensor.n_rows)
    kind = gguf.GGMLQuantizationType[tensor.type_name]
    found = gguf.quants.dequantize(rows, kind).astype(np.float64)
    shaped: NDArray[np.float64] = found.reshape(tensor.shape[::-1])
    return shaped


def added(name: str, of: Arrays, scale: float) -> NDArray[np.float64]:
    """Return scale · B A, summed apart from the code under test."""
    a, b = (of[name + end].astype(np.float64) for end in (".lora_a", ".lora_b"))
    if name == EMBED:
        a, b = b.T, a
    product: NDArray[np.float64] = np.einsum("...or,...ri->...oi", b, a)
    return scale * product


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_merging_adds_the_scaled_product_and_changes_nothing_else(
    tmp_path: Path, dtype: str
) -> None:
    model = write_tiny_model(tmp_path / "base.gguf", weight_type=dtype)
    made = factors(SHAPES)
    adapter = write_adapter(tmp_path / "tuned.gguf", made)
    path = local_path(model, lora=adapter)
    assert path.name == "base-tuned.gguf"
    bits = {"F32": 24, "F16": 11, "BF16": 8}[dtype]
    with open_gguf(model) as before, open_gguf(path, kind_check=True) as after:
        assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
        assert set(after.metadata) - set(before.metadata) == {"ramgguf.lora_sha256"}
        for tensor in before.tensors:
            was, now = weights(before, tensor.name), weights(after, tensor.name)
            assert after.tensor(tensor.name).type_name == tensor.type_name
            if tensor.name not in SHAPES:
                assert np.array_equal(was, now)
                continue
            expected = was + added(tensor.name, made, ALPHA / RANK)
            # Half a unit in the last place: rounded once, to nearest.
            half_unit = np.exp2(np.floor(np.log2(np.abs(expected))) - bits) * (1 + 1e-6)
            assert np.all(np.abs(now - expected) <= np.maximum(half_unit, 2.0**-25))
            assert not np.array_equal(was, now)


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0"])
def test_factors_may_be_stored_in_any_type_that_decodes(tmp_path: Path, stored: str) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    made = factors({Q: SHAPES[Q]}, rank=32)
    kind = gguf.GGMLQuantizationType[stored]
    decoded = {n: gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
               for n, x in made.items()}  # fmt: skip
    adapter = write_adapter(tmp_path / "tuned.gguf", made, stored=stored)
    with open_gguf(model) as before, open_gguf(local_path(model, lora=adapter)) as after:
        expected = weights(before, Q) + added(Q, decoded, ALPHA / 32)
        assert np.abs(weights(after, Q) - expected).max() < 2.0**-23


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_the_product_is_added_as_it_is(tmp_path: Path, alpha: float | None) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    made = factors({Q: SHAPES[Q]})
    adapter = write_adapter(tmp_path / "tuned.gguf", made, alpha=alpha)
    with open_gguf(model) as before, open_gguf(local_path(model, lora=adapter)) as after:
        expected = weights(before, Q) + added(Q, made, 1.0)
        assert np.abs(weights(after, Q) - expected).max() < 2.0**-23


def test_every_expert_gets_its_own_product_across_chunks_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramgguf.gguf.gguf_lora._WEIGHTS_AT_ONCE", 256 * 100)  # 100 rows
    moe = next(a for a in ARCHITECTURES if a.name == "qwen3moe")
    model = write_small_model(tmp_path / "moe.gguf", moe)
    name = "blk.0.ffn_up_exps.weight"
    with open_gguf(model) as before:
        made = factors({name: before.tensor(name).shape[::-1]})
        adapter = write_adapter(tmp_path / "tuned.gguf", made, arch="qwen3moe")
        with open_gguf(local_path(model, lora=adapter)) as after:
            expected = weights(before, name) + added(name, made, ALPHA / RANK)
            assert np.abs(weights(after, name) - expected).max() < 2.0**-11


_LOGITS = """
import ctypes, json, sys
import numpy as np
from ramgguf.llama.system import llama_module
llama = llama_module()
path, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 64
params.n_threads = params.n_threads_batch = 1
loaded = llama.llama_adapter_lora_init(model, adapter.encode()) if adapter else None
assert bool(loaded) == bool(adapter)
context = llama.llama_init_from_model(model, params)
if loaded:
    one = (ctypes.c_void_p * 1)(ctypes.cast(loaded, ctypes.c_void_p).value)
    set_loras = llama.llama_cpp._lib.llama_set_adapters_lora
    set_loras.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert set_loras(context, one, 1, (ctypes.c_float * 1)(1.0)) == 0
array = (llama.llama_token * len(tokens))(*tokens)
batch = llama.llama_batch_get_one(array, len(tokens))
assert llama.llama_decode(context, batch) == 0
n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (n_vocab,))
print(json.dumps(logits.astype(float).tolist()))
"""


def _logits(model: Path, adapter: Path | None = None) -> NDArray[np.float64]:
    done = subprocess.run(
        [sys.executable, "-c", _LOGITS, str(model), str(adapter or ""), json.dumps([1, 70, 99, 7])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("dtype", "most"), [("F32", 2e-4), ("F16", 6e-3)])
def test_llama_cpp_computes_the_same_from_base_and_adapter_as_from_the_merged_file(
    tmp_path: Path, dtype: str, most: float
) -> None:
    pytest.importorskip("llama_cpp")
    model = write_tiny_model(tmp_path / "base.gguf", weight_type=dtype)
    adapter = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    base, tuned, merged = _logits(model), _logits(model, adapter), _logits(
        local_path(model, lora=adapter)
    )  # fmt: skip
    scale = np.abs(base).max()
    assert np.abs(tuned - base).max() > 0.05 * scale  # the adapter does something
    assert np.abs(tuned - merged).max() <= most * scale


def test_a_model_and_an_adapter_are_quantized_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "base.gguf")
    adapter = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    before = model.read_bytes()
    command = [RAMGGUF, "quantize", str(model), "--lora", str(adapter), "-b", "60%"]
    for said in ("tuned.gguf: changes 3 tensors of", "tuned.gguf: merged before,"):
        done = subprocess.run(
            [*command, "--effort", "fast", "-o", "out.gguf", "--force"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
    assert model.read_bytes() == before
    merged = local_path(model, lora=adapter)
    assert merged.is_relative_to(converted_folder())
    assert beside(merged, "x.json") == Path("x.json")  # nothing is written into the cache
    with open_gguf(merged) as source, open_gguf(tmp_path / "out.gguf") as out:
        wanted = weights(source, DOWN)
        assert ((weights(out, DOWN) - wanted) ** 2).sum() < 0.05 * (wanted**2).sum()


def test_another_adapter_or_base_is_merged_anew(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    first = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    path = local_path(model, lora=first)
    (tmp_path / "b").mkdir()
    second = write_adapter(tmp_path / "b" / "tuned.gguf", factors(SHAPES, seed=8))
    other = write_tiny_model(tmp_path / "b" / "base.gguf", seed=1)
    found = {path, local_path(model, lora=second), local_path(other, lora=first)}
    assert len(found) == 3
    assert local_path(model, lora=first) == path


def test_a_checkpoint_is_converted_before_an_adapter_in_gguf_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = write_tiny_model(tmp_path / "ready.gguf")
    monkeypatch.setattr("ramgguf.gguf.hub.convert", lambda *_, **__: ready)
    folder = write_checkpoint(tmp_path / "m")
    adapter = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    assert local_path(folder, lora=adapter) == local_path(ready, lora=adapter)


def test_norms_in_an_adapter_are_left_out_and_said(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    norm = "blk.0.attn_norm.weight"
    tensors = factors({Q: SHAPES[Q]}) | {norm: np.full(WIDTH, 2, np.float32)}
    adapter = write_adapter(tmp_path / "tuned.gguf", tensors)
    said: list[str] = []
    with open_gguf(local_path(model, lora=adapter, announce=said.append)) as file:
        assert np.all(weights(file, norm) == 1)
    assert any("leaves out 1 norm ('blk.0.attn_norm.weight' first)" in s for s in said)


def _only(end: str) -> Arrays:
    return {n: x for n, x in factors({Q: SHAPES[Q]}).items() if n.endswith(end)}


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another architecture": (
        lambda p: write_adapter(p, factors(SHAPES), arch="qwen2"),
        "is for 'qwen2' models, and .* is 'llama'; name the model that it was trained on",
    ),
    "a model": (lambda p: write_tiny_model(p), r"is no adapter \(general.type is None\)"),
    "another method": (
        lambda p: write_adapter(p, factors(SHAPES), method="ia3"),
        "of kind 'ia3'; 'lora' can be merged",
    ),
    "an activated LoRA": (
        lambda p: write_adapter(
            p, factors(SHAPES), extra={"adapter.alora.invocation_tokens": [1, 2]}
        ),
        "is an activated LoRA",
    ),
    "an infinite alpha": (
        lambda p: write_adapter(p, factors(SHAPES), alpha=float("inf")),
        "adapter.lora.alpha is no finite number",
    ),
    "a tensor that the base lacks": (
        lambda p: write_adapter(p, factors({"blk.9.attn_q.weight": (WIDTH, WIDTH)})),
        "changes 1 tensor, of which .* lacks 1, 'blk.9.attn_q.weight' first",
    ),
    "another width": (
        lambda p: write_adapter(p, factors({Q: (WIDTH, 2 * WIDTH)})),
        r"'blk.0.attn_q.weight' have shapes \(128, 4\) and \(4, 64\), which do not fit",
    ),
    "factors of two ranks": (
        lambda p: write_adapter(
            p, _only(".lora_a") | {Q + ".lora_b": np.zeros((WIDTH, 5), np.float32)}
        ),
        "which do not fit",
    ),
    "one factor only": (
        lambda p: write_adapter(p, _only(".lora_a")),
        "has blk.0.attn_q.weight.lora_a only",
    ),
    "no factors": (lambda p: write_adapter(p, {}), "there is nothing to merge"),
    "a tensor of no kind": (
        lambda p: write_adapter(p, {"blk.0.attn_q.bias": np.zeros(WIDTH, np.float32)}),
        "'blk.0.attn_q.bias' is no part of LoRA",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_one_line_that_says_why(tmp_path: Path, kind: str) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    make, said = REFUSED[kind]
    adapter = make(tmp_path / "tuned.gguf")
    with pytest.raises(CheckpointError, match=said) as caught:
        local_path(model, lora=adapter)
    assert "\n" not in str(caught.value)
    assert not [p for p in converted_folder().rglob("*") if p.is_file()]


def test_a_quantized_base_is_refused_by_the_type_of_the_tensor(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base.gguf", weight_type="Q8_0")
    adapter = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    with pytest.raises(CheckpointError, match="is Q8_0, and an adapter is merged into F32, F16"):
        local_path(model, lora=adapter)


def test_adapters_of_peft_and_of_gguf_name_what_each_is_for(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base.gguf")
    write_peft_adapter(tmp_path / "tuned", {"model.layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(CheckpointError, match=r"is no checkpoint.*convert_lora_to_gguf\.py"):
        ramgguf.quantize(model, "50%", lora=tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"name its folder, with adapter_config\.json"):
        local_path(model, lora=tmp_path / "tuned" / "adapter_model.safetensors")
    adapter = write_adapter(tmp_path / "tuned.gguf", factors(SHAPES))
    with pytest.raises(RamggufError, match="with this file as --lora"):
        ramgguf.quantize(adapter, "50%")
