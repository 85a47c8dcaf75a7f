"""Checkpoints as sources: found, converted once, merged with an adapter, refused by name.

The converter needs PyTorch. Where it is missing, a command of its name on PATH notes its arguments
and copies a ready GGUF file; one test converts for real and is skipped there.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import ramgguf
from hub_stand_in import COMMIT, StandIn
from ramgguf.cli.app import app
from ramgguf.core.errors import CheckpointError, GGUFError
from ramgguf.gguf.checkpoint import Checkpoint
from ramgguf.gguf.conversion import CONVERTER, convert, converted_folder, converter
from ramgguf.gguf.hub import beside, highest_precision, local_path
from ramgguf.gguf.lora import Adapter, merge
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.safetensors import from_float, read_header, to_float
from ramgguf.quants.encoders import libggml
from small_checkpoint import (
    WIDTH,
    bf16,
    from_bf16,
    quantized_again,
    write_checkpoint,
    write_peft_adapter,
    write_safetensors,
)
from tiny_models import write_tiny_model

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
_REAL = converter()  # before tests change PATH
Write = Callable[..., Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for the converter on PATH; return the file of its runs' arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ready = write_tiny_model(tmp_path / "ready.gguf")
    commands, log = tmp_path / "bin", tmp_path / "runs"
    commands.mkdir()
    command = commands / CONVERTER
    command.write_text(
        f"#!{sys.executable}\n"
        "import json, shutil, sys\n"
        f"with open({str(log)!r}, 'a') as f: f.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"shutil.copy({str(ready)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    return log


def _runs(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a converter on PATH that runs this script."""
    commands = tmp_path / "failing"
    commands.mkdir()
    (commands / CONVERTER).write_text(f"#!{sys.executable}\n{script}\n")
    (commands / CONVERTER).chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")


def test_a_checkpoint_is_quantized_in_one_command_into_the_current_folder(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "my-finetune", n_files=2)
    monkeypatch.chdir(tmp_path)
    command = [RAMGGUF, "quantize", "./my-finetune", "-b", "60%", "--effort", "fast", "--json"]
    for _ in range(2):
        done = subprocess.run([*command, "--force"], capture_output=True, text=True, check=True)
        (path,) = json.loads(done.stdout)["paths"]
        assert path.startswith("my-finetune-ram-")
        with open_gguf(tmp_path / path) as file:
            assert file.architecture == "llama"
    (run,) = _runs(stand_in)  # the second time it is in the cache
    assert run[1:3] == ["--outtype", "bf16"]
    assert Path(run[0]).resolve() == folder.resolve()
    names = {p.name for p in folder.iterdir()}
    assert not any(name.endswith(".gguf") for name in names)
    made = list(converted_folder().rglob("*"))
    assert [p.name for p in made if p.is_file()] == ["my-finetune-bf16.gguf"]


def test_what_is_converted_depends_on_every_byte_of_the_checkpoint(
    tmp_path: Path, stand_in: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    first = local_path(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    second = local_path(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert len({first, second, local_path(folder)}) == 3
    assert len(_runs(stand_in)) == 3
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "m")
    local_path(copy)
    assert len(_runs(stand_in)) == 3


def test_what_is_made_from_a_converted_file_is_not_put_into_the_cache(
    tmp_path: Path, stand_in: Path
) -> None:
    path = local_path(write_checkpoint(tmp_path / "m"))
    assert beside(path, "x.json") == Path("x.json")
    assert beside(Path(), "x.json") == Path("x.json")


def test_weights_in_f16_keep_their_bits(tmp_path: Path, stand_in: Path) -> None:
    path = local_path(write_checkpoint(tmp_path / "m", dtype="F16"))
    assert path.name == "m-f16.gguf"
    assert _runs(stand_in)[0][2] == "f16"


def test_without_the_converter_the_line_names_the_extra_and_the_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ramgguf.gguf.conversion.converter", lambda: None)
    folder = write_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"ramgguf\[convert\].*whl/cpu"):
        local_path(folder)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import no_such_torch", r"cannot import no_such_torch; pip install 'ramgguf\[convert\]'"),
        ("raise NotImplementedError('Odd is not supported')", "status 1: .*Odd is not supported"),
        ("import os; os.abort()", "ended with status -6: it said nothing"),
        (
            "import sys; a = sys.argv; open(a[a.index('--outfile') + 1], 'w').write('x')",
            "wrote no GGUF file",
        ),
        ("pass", "wrote no GGUF file"),
    ],
)
def test_a_converter_that_fails_leaves_a_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    _fails(tmp_path, monkeypatch, script)
    with pytest.raises(CheckpointError, match=said):
        local_path(write_checkpoint(tmp_path / "m"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345678\n"


_HEADER = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'
ENDLESS = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(4)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.safetensors": LFS}, "Git LFS pointer.*git lfs pull"),
        ({"config.json": LFS}, "Git LFS pointer.*git lfs pull"),
        ({"model.safetensors": b"<!doctype html><html>" + bytes(80)}, "is a web page"),
        ({"config.json": b"<html>"}, "is a web page"),
        ({"config.json": b"[]"}, "expected a JSON object"),
        ({"model.safetensors": b"\x10\0\0\0\0\0\0\0{no header at al"}, "header is damaged"),
        ({"model.safetensors": ENDLESS}, "header is damaged: cannot convert float infinity"),
        ({"model.safetensors": None}, "has a config.json and no weights"),
        ({"model.safetensors": None, "pytorch_model.bin": b"PK"}, "save them as safetensors"),
        ({"config.json": None}, "has safetensors files and no config.json"),
        ({"config.json": None, "model.safetensors": None}, "neither a .gguf file nor a checkpoint"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "model-00002.safetensors"}}'},
            "lacks 1 of 1 safetensors file, model-00002.safetensors first",
        ),
        ({"config.json": None, "adapter_config.json": b"{}"}, "is an adapter; .* --lora"),
        ({"config.json": b'{"quantization_config": {"quant_method": "awq"}}'}, "by AWQ, which"),
        (
            {"config.json": b'{"quantization_config": {"quant_method": "gptq", "bits": 3}}'},
            "by 3-bit GPTQ, which",
        ),
    ],
)
def test_a_folder_that_cannot_be_converted_says_what_to_do(
    tmp_path: Path, stand_in: Path, files: dict[str, bytes | None], said: str
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    for name, data in files.items():
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        local_path(folder)
    assert "\n" not in str(caught.value)
    assert _runs(stand_in) == []


def test_a_tensor_beyond_the_end_of_its_file_is_refused(tmp_path: Path, stand_in: Path) -> None:
    path = write_checkpoint(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="lies outside the file"):
        local_path(path.parent)


def test_what_the_converter_dequantizes_is_left_to_it(tmp_path: Path, stand_in: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    local_path(folder)
    assert len(_runs(stand_in)) == 1


# --- adapters ---


QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"down_proj": 2}}, (2.0, 0.5)),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, (0.25, 2.0)),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_merging_adds_the_scaled_product_and_changes_nothing_else(
    tmp_path: Path, dtype: str, config: dict[str, object], scales: tuple[float, float]
) -> None:
    base = Checkpoint.of(write_checkpoint(tmp_path / "base", dtype=dtype, n_files=2))
    added = write_peft_adapter(tmp_path / "tuned", {QUERY: (64, 64), DOWN: (64, 128)}, **config)
    (tmp_path / "merged").mkdir()
    merged = merge(base, Adapter.of(tmp_path / "tuned"), tmp_path / "merged")
    assert merged.name == "base-tuned"
    by_module = dict(zip((QUERY, DOWN), scales, strict=True))
    for name, old in base.tensors.items():
        was, now = np.asarray(old.values()), np.asarray(merged.tensors[name].values())
        module = name.removesuffix(".weight")
        if module not in by_module:
            assert np.array_equal(was, now)
            continue
        a, b = (
            added[f"base_model.model.{module}.lora_{w}.weight"].astype(np.float64) for w in "AB"
        )
        expected = np.array(
            [
                [math.fsum([x, *(by_module[module] * b[i, r] * a[r, j] for r in range(4))])
                 for j, x in enumerate(row)]
                for i, row in enumerate(
                    (from_bf16(was) if dtype == "BF16" else was).astype(np.float64)
                )
            ]
        )  # fmt: skip
        bits = {"F32": 24, "F16": 11, "BF16": 8}[dtype]
        found = (from_bf16(now) if dtype == "BF16" else now).astype(np.float64)
        # Half a unit in the last place: rounded once, to nearest.
        half_unit = np.exp2(np.floor(np.log2(np.abs(expected))) - bits) * (1 + 1e-6)
        assert np.all(np.abs(found - expected) <= np.maximum(half_unit, 2.0**-25))
        assert not np.array_equal(was, now)


def test_weights_that_are_stored_turned_get_the_product_turned(tmp_path: Path) -> None:
    base = Checkpoint.of(write_checkpoint(tmp_path / "base", dtype="F32"))
    # Conv1D of GPT-2 stores inputs × outputs; here down_proj is taken to be one.
    added = write_peft_adapter(tmp_path / "tuned", {DOWN: (128, 64)}, fan_in_fan_out=True)
    (tmp_path / "merged").mkdir()
    merged = merge(base, Adapter.of(tmp_path / "tuned"), tmp_path / "merged").tensors
    a, b = (added[f"base_model.model.{DOWN}.lora_{w}.weight"].astype(np.float64) for w in "AB")
    was = np.asarray(base.tensors[f"{DOWN}.weight"].values(), np.float64)
    expected = (was + 2.0 * (b @ a).T).astype(np.float32)
    assert np.array_equal(np.asarray(merged[f"{DOWN}.weight"].values()), expected)


def test_embeddings_and_saved_modules_are_merged_as_peft_does(tmp_path: Path) -> None:
    base = Checkpoint.of(write_checkpoint(tmp_path / "base", dtype="F32"))
    n_vocab = base.tensors["lm_head.weight"].shape[0]
    rng = np.random.default_rng(3)
    a = rng.standard_normal((2, n_vocab), dtype=np.float32)
    b = rng.standard_normal((WIDTH, 2), dtype=np.float32)
    head = rng.standard_normal((n_vocab, WIDTH), dtype=np.float32)
    write_peft_adapter(tmp_path / "tuned", {})
    write_safetensors(
        tmp_path / "tuned" / "adapter_model.safetensors",
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", a),
            "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", b),
            "base_model.model.lm_head.weight": ("BF16", bf16(head)),
        },
    )
    (tmp_path / "merged").mkdir()
    merged = merge(base, Adapter.of(tmp_path / "tuned"), tmp_path / "merged").tensors
    was = np.asarray(base.tensors["model.embed_tokens.weight"].values(), np.float64)
    expected = was + 4.0 * (b.astype(np.float64) @ a.astype(np.float64)).T
    now = np.asarray(merged["model.embed_tokens.weight"].values())
    assert np.array_equal(now, expected.astype(np.float32))
    assert np.array_equal(np.asarray(merged["lm_head.weight"].values()), from_bf16(bf16(head)))


def test_factors_are_added_to_the_base_that_an_adapter_saved(tmp_path: Path) -> None:
    """As peft saves it where embeddings are among the modules that it adapts."""
    base = Checkpoint.of(write_checkpoint(tmp_path / "base", dtype="F32"))
    shape = base.tensors["model.embed_tokens.weight"].shape
    rng = np.random.default_rng(3)
    a = rng.standard_normal((4, shape[0]), dtype=np.float32)
    b = rng.standard_normal((shape[1], 4), dtype=np.float32)
    saved = rng.standard_normal(shape, dtype=np.float32)
    write_peft_adapter(tmp_path / "tuned", {})
    write_safetensors(
        tmp_path / "tuned" / "adapter_model.safetensors",
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", a),
            "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", b),
            "base_model.model.model.embed_tokens.base_layer.weight": ("F32", saved),
        },
    )
    (tmp_path / "merged").mkdir()
    merged = merge(base, Adapter.of(tmp_path / "tuned"), tmp_path / "merged").tensors
    expected = saved + 2.0 * (b.astype(np.float64) @ a.astype(np.float64)).T
    now = np.asarray(merged["model.embed_tokens.weight"].values())
    assert np.array_equal(now, expected.astype(np.float32))


def test_bf16_is_rounded_once() -> None:
    half = 1 + 2.0**-8  # between two numbers of BF16
    values = np.array([half, half + 2.0**-40, half - 2.0**-40, -half - 2.0**-40, 1e39, np.nan])
    bits = from_float(values, "BF16")
    expected = [1.0, 1 + 2.0**-7, 1.0, -1 - 2.0**-7, np.inf, np.nan]
    assert np.array_equal(from_bf16(bits.astype(np.uint16)), expected, equal_nan=True)


def test_an_adapter_is_merged_before_the_checkpoint_is_converted(
    tmp_path: Path, stand_in: Path
) -> None:
    folder = write_checkpoint(tmp_path / "base")
    before = (folder / "model.safetensors").read_bytes()
    write_peft_adapter(tmp_path / "tuned", {QUERY: (64, 64)})
    path = local_path(folder, lora=tmp_path / "tuned")
    assert path.name == "base-tuned-bf16.gguf"
    assert local_path(folder).name == "base-bf16.gguf"
    assert local_path(folder, lora=tmp_path / "tuned") == path
    assert len(_runs(stand_in)) == 2
    assert (folder / "model.safetensors").read_bytes() == before
    assert not [p for p in converted_folder().rglob("*") if p.suffix in (".safetensors", ".log")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "of kind IA3; LORA can be merged"),
        ({"use_dora": True}, "use_dora is True, which is not merged here"),
        ({"bias": "all"}, "bias is 'all', which is not merged here"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a number"),
        ({"alpha_pattern": {"*q": 8}}, "expected an object of regexes: nothing to repeat"),
        ({"alpha_pattern": [8]}, "expected an object of regexes"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which is"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which is not merged here"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is .*, which is not merged"),
        ({"use_qalora": True}, "use_qalora is True, which is not merged here"),
    ],
)
def test_other_adapters_are_refused_by_name(
    tmp_path: Path, stand_in: Path, change: dict[str, object], said: str
) -> None:
    folder = write_checkpoint(tmp_path / "base")
    write_peft_adapter(tmp_path / "tuned", {QUERY: (64, 64)}, **change)
    with pytest.raises(CheckpointError, match=said):
        local_path(folder, lora=tmp_path / "tuned")


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        ("model.layers.9.self_attn.q_proj", (64, 64), "'model.layers.9.*' first; is it an adapter"),
        (QUERY, (64, 32), r"with shape \(64, 32\), and the checkpoint's is \(64, 64\)"),
    ],
)
def test_an_adapter_of_another_model_names_the_tensor(
    tmp_path: Path, stand_in: Path, module: str, shape: tuple[int, int], said: str
) -> None:
    folder = write_checkpoint(tmp_path / "base")
    write_peft_adapter(tmp_path / "tuned", {module: shape})
    with pytest.raises(CheckpointError, match=said):
        local_path(folder, lora=tmp_path / "tuned")
    assert _runs(stand_in) == []


def test_an_adapter_has_no_place_in_a_gguf_file(tmp_path: Path) -> None:
    write_peft_adapter(tmp_path / "tuned", {QUERY: (64, 64)})
    model = write_tiny_model(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        ramgguf.quantize(model, "50%", lora=tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        ramgguf.quantize(model, "50%", lora=tmp_path)


def test_values_survive_their_dtype_and_round_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-30, 20, 0.05)
    for dtype in ("F64", "F32", "BF16"):
        stored = from_float(values, dtype)
        again = to_float(stored, dtype)
        assert np.array_equal(from_float(again, dtype), stored)
        bits = {"F64": 53, "F32": 24, "BF16": 8}[dtype]
        assert np.all(np.abs(again - values) <= np.abs(values) * 2.0**-bits)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    assert to_float(from_float(ties, "BF16"), "BF16").tolist() == [1, 1 + 2**-6, -1]
    odd = np.array([np.nan, np.inf, -np.inf])
    assert np.array_equal(to_float(from_float(odd, "BF16"), "BF16"), odd, equal_nan=True)


def test_only_dtypes_of_weights_can_be_merged(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"w": ("F8_E4M3", np.zeros((2, 2), np.uint8))})
    with pytest.raises(CheckpointError, match="tensor 'w' is F8_E4M3; expected"):
        read_header(tmp_path / "x.safetensors")["w"].values()


# --- the hub ---


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["m-Q4_K_M.gguf", "m-f16.gguf", "m-Q8_0.gguf"], "m-f16.gguf"),
        (["m-F16.gguf", "m-BF16.gguf"], "m-BF16.gguf"),
        (["m.BF16.gguf", "m.F32.gguf"], "m.F32.gguf"),
        (["m-Q4_K_S.gguf", "m-Q4_K_M.gguf", "m-IQ4_XS.gguf"], "m-Q4_K_M.gguf"),
        (["mmproj-m-f32.gguf", "m-Q6_K.gguf", "m.imatrix.gguf"], "m-Q6_K.gguf"),
        (["q/m-Q2_K.gguf", "f/m-bf16-00002-of-00002.gguf", "f/m-bf16-00001-of-00002.gguf"],
         "f/m-bf16-00001-of-00002.gguf"),
        (["m-Q8_0.gguf", "config.json", "model.safetensors"], None),
        (["m-f16.gguf", "config.json", "model.safetensors"], "m-f16.gguf"),
        (["README.md"], None),
        (["model.gguf"], "model.gguf"),
    ],
)  # fmt: skip
def test_of_several_files_the_one_of_the_highest_precision_is_taken(
    files: list[str], chosen: str | None
) -> None:
    assert highest_precision(files) == chosen


def test_a_repository_without_a_file_name_is_a_source(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "made", n_files=2)
    weights = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = write_tiny_model(tmp_path / "m-f32.gguf").read_bytes()
    repos = {
        "acme/weights": weights | {"consolidated.safetensors": b"0", "onnx/model.json": b"0"},
        "acme/files": {"m-f32.gguf": model, "m-Q8_0.gguf": b"0"},
        "acme/closed": weights,
        "acme/nothing": {"README.md": b""},
    }
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with StandIn(repos, gated=frozenset({"acme/closed"})).serving() as hub:
        bare = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        bare |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub")}

        def run(address: str, **more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [RAMGGUF, "quantize", address, "-b", "60%", "--effort", "fast", "--force"],
                capture_output=True, text=True, check=False, env=bare | more,
            )  # fmt: skip

        done = run("hf://acme/files")
        assert done.returncode == 0, done.stderr
        assert "hf://acme/files@main: takes m-f32.gguf, the highest precision" in done.stderr
        assert not any("Q8_0" in r for r in hub.requests)
        done = run("hf://acme/weights@v1")
        assert done.returncode == 0, done.stderr
        assert "weights-ram-" in done.stdout
        assert not any("consolidated" in r or "onnx" in r for r in hub.requests)
        ((first, *_),) = _runs(stand_in)
        assert f"/snapshots/{COMMIT}" in first
        (output,) = (tmp_path / "here").glob("weights-ram-*.gguf")
        with open_gguf(output) as file:
            assert file.metadata.string("ramgguf.source_repo") == "acme/weights"
            assert file.metadata.string("ramgguf.source_revision") == COMMIT
        card = CliRunner().invoke(app, ["card", str(output)], catch_exceptions=False).output
        assert 'base_model:\n- "acme/weights"\n' in card
        assert f"hf://acme/weights@{COMMIT}" in card
        hub.requests.clear()
        offline = run(f"hf://acme/weights@{COMMIT}", HF_HUB_OFFLINE="1")
        assert offline.returncode == 0, offline.stderr
        assert hub.requests == []
        assert len(_runs(stand_in)) == 1
        wrong = {
            "hf://acme/closed": "is gated; accept its terms",
            "hf://acme/nothing": "has neither GGUF nor safetensors files",
            "hf://acme/none": "no repository acme/none",
        }
        code = (
            "import sys\nfrom ramgguf.gguf.hub import local_path, HubError\n"
            "for address in sys.argv[1:]:\n"
            "    try: local_path(address)\n"
            "    except HubError as e: print(e)\n"
        )
        for addresses, more in ((wrong, {}), (["hf://acme/files"], {"HF_HUB_OFFLINE": "1"})):
            told = subprocess.run(
                [sys.executable, "-c", code, *addresses],
                capture_output=True, text=True, check=True, env=bare | more,
            ).stdout.splitlines()  # fmt: skip
            assert len(told) == len(addresses)
            for address, line in zip(addresses, told, strict=True):
                assert line.startswith(address)
                assert wrong.get(address, "name a .gguf file") in line


# --- for real ---


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_converter_itself_keeps_every_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    if _REAL is None:
        pytest.skip(f"{CONVERTER} is not installed: pip install 'ramgguf[convert]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = Checkpoint.of(write_checkpoint(tmp_path / "m", dtype=dtype))
    try:
        path = convert(checkpoint)
    except CheckpointError as e:
        if "cannot import" not in str(e):
            raise
        pytest.skip(str(e))
    names = {"ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj", "attn_v": "self_attn.v_proj"}
    with open_gguf(path, kind_check=True) as file:
        tensors = {t.name: t for t in file.tensors}
        for ours, theirs in names.items():
            tensor = tensors[f"blk.1.{ours}.weight"]
            assert tensor.type_name == dtype
            stored = np.asarray(checkpoint.tensors[f"model.layers.1.{theirs}.weight"].values())
            read = file.read_rows(tensor, 0, tensor.n_rows)
            assert np.ascontiguousarray(read).tobytes() == stored.tobytes()


def _converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return what the real converter makes of the checkpoint tmp_path/m."""
    if _REAL is None:
        pytest.skip(f"{CONVERTER} is not installed: pip install 'ramgguf[convert]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return convert(Checkpoint.of(tmp_path / "m"))


def _weights(path: Path, name: str) -> NDArray[np.float64]:
    with open_gguf(path, kind_check=True) as file:
        tensor = file.tensor(name)
        assert tensor.type_name == "BF16"
        bits = file.read_rows(tensor, 0, tensor.n_rows).view("<u2")
    return from_bf16(bits).astype(np.float64)


def _e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return what bytes of FP8 stand for: a sign, four bits of exponent, three of fraction."""
    sign, exponent, fraction = codes >> 7, (codes >> 3) & 15, codes & 7
    normal = (8.0 + fraction) * np.exp2(exponent - 10.0)
    values: NDArray[np.float64] = np.where(exponent == 0, fraction * 2.0**-9, normal)
    return values * (1.0 - 2.0 * sign)


def test_the_converter_turns_fp8_back_and_the_scales_of_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 0x7F, (64, 128)).astype(np.uint8)  # 0x7f is NaN
    codes |= (rng.integers(0, 2, codes.shape) << 7).astype(np.uint8)
    scales = rng.uniform(1e-3, 1e-2, (2, 4)).astype(np.float32)
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    quantized_again(
        write_checkpoint(tmp_path / "m"), "down_proj", said,
        lambda module: {
            f"{module}.weight": ("F8_E4M3", codes), f"{module}.weight_scale_inv": ("F32", scales),
        },
    )  # fmt: skip
    found = _weights(_converted(tmp_path, monkeypatch), "blk.1.ffn_down.weight")
    expected = _e4m3(codes) * np.repeat(np.repeat(scales, 32, axis=0), 32, axis=1)
    assert np.abs(found - expected).max() <= 2.0**-8 * np.abs(expected).max()
    assert np.all(np.abs(found - expected) <= 2.0**-8 * np.abs(expected) * (1 + 1e-6))


def test_weights_of_gptq_are_turned_back_and_kept_exactly_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    n_in, n_out, group = 128, 64, 32
    codes = rng.integers(0, 16, (n_in, n_out))
    scales = rng.uniform(1e-3, 1e-2, (n_in // group, n_out)).astype(np.float16)

    def packed(values: NDArray[np.int64], axis: int) -> NDArray[np.int32]:
        """Return eight values of four bits to an integer, along an axis."""
        parts = [np.take(values, range(k, values.shape[axis], 8), axis) << 4 * k for k in range(8)]
        found: NDArray[np.int32] = np.bitwise_or.reduce(parts).astype(np.uint32).view(np.int32)
        return found

    zeros = packed(np.full((n_in // group, n_out), 7), 1)  # read as 8
    quantized_again(
        write_checkpoint(tmp_path / "m"), "down_proj",
        {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True},
        lambda module: {
            f"{module}.qweight": ("I32", packed(codes, 0)), f"{module}.qzeros": ("I32", zeros),
            f"{module}.scales": ("F16", scales),
            f"{module}.g_idx": ("I32", np.arange(n_in) // group),
        },
    )  # fmt: skip
    folder = Checkpoint.of(tmp_path / "m")
    path = _converted(tmp_path, monkeypatch)
    found = _weights(path, "blk.1.ffn_down.weight")
    expected = ((codes - 8.0) * np.repeat(scales.astype(np.float64), group, axis=0)).T
    assert np.all(np.abs(found - expected) <= 2.0**-8 * np.abs(expected) * (1 + 1e-6))
    assert path.stat().st_size == pytest.approx(folder.n_bytes_converted, rel=0.15)
    down = [t for t in ramgguf.measure(path, threads=1).tensors if "ffn_down" in t.name]
    assert [t.grid for t in down] == ["Q4_0", "Q4_0"]


def test_blocks_of_nvfp4_are_kept_and_are_a_source_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not libggml.decodes("NVFP4"):
        pytest.skip("needs a libggml that has NVFP4")
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 16, (64, 128)).astype(np.uint8)
    scales = rng.integers(0x30, 0x78, (64, 8)).astype(np.uint8)  # 0.5 to 240
    quantized_again(
        write_checkpoint(tmp_path / "m"), "down_proj",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda module: {
            f"{module}.weight": ("U8", codes[:, ::2] | codes[:, 1::2] << 4),
            f"{module}.weight_scale": ("F8_E4M3", scales),
            f"{module}.weight_scale_2": ("F32", np.array(1e-4, np.float32)),
        },
    )  # fmt: skip
    path, name = _converted(tmp_path, monkeypatch), "blk.1.ffn_down.weight"
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = np.where(codes & 8, -1, 1) * values[codes & 7] * np.repeat(_e4m3(scales), 16, axis=1)
    with open_gguf(path, kind_check=True) as file:
        tensor, scale = file.tensor(name), file.tensor("blk.1.ffn_down.scale")
        assert tensor.type_name == "NVFP4"
        assert file.read_rows(scale, 0, 1).view("<f4").item() == np.float32(1e-4)
        found = libggml.decode("NVFP4", file.read_rows(tensor, 0, 64), 128)
    assert np.array_equal(found, expected)
    for allowed, formats in ((False, {"NVFP4"}), (True, {"NVFP4", "Q4_0", "MXFP4", "Q2_0"})):
        measured = ramgguf.measure(
            path, formats=["Q4_0", "MXFP4", "Q2_0"], allow_requantize=allowed, threads=1
        )
        (down,) = (t for t in measured.tensors if t.name == name)
        assert {p.format for p in down.points} <= formats
        assert ("already quantized to NVFP4" in (down.kept or "")) != allowed


def test_packed_weights_count_as_16_bits_each(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    before = Checkpoint.of(folder).n_bytes_converted
    packed = np.zeros((16, 64), np.int32)  # 128 × 64 weights of 4 bits
    said = {"quant_method": "gptq", "bits": 4}
    quantized_again(folder, "down_proj", said, lambda m: {f"{m}.qweight": ("I32", packed)})
    assert Checkpoint.of(folder).n_bytes_converted == before


def test_a_folder_with_one_gguf_file_and_no_checkpoint_is_named(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m.gguf")
    with pytest.raises(GGUFError, match=r"is a folder; name a file in it: m\.gguf"):
        ramgguf.measure(tmp_path)
