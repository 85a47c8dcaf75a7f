"""Layers rounded one by one: streams are those of whole models, and blocks what they aim at."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import ramgguf
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.layer_rounding import LayerRounding
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.quants.correction import ChangedInputs
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.imatrix import Imatrix, load_imatrix
from tiny_models import write_tiny_model

N_LAYERS, N_CTX = 3, 64
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES = tuple(f"blk.{k}.{part}.weight" for k in range(N_LAYERS) for part in PARTS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16", n_layers=N_LAYERS)


@pytest.fixture
def small(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    pins = [rf"blk\..*(attn|ffn)_(?!norm)={'Q4_0'}", "token_embd=Q8_0"]
    ramgguf.quantize(model, "90%", path, effort="fast", encoder="search", pins=pins)
    return path


@pytest.fixture
def imatrix(model: Path, tmp_path: Path) -> Imatrix:
    matrix, hessian = tmp_path / "m.imatrix.gguf", tmp_path / "m.hessian.gguf"
    ramgguf.calibrate(model, matrix, tokens="mix", n_sequences=10, n_ctx=N_CTX, hessian=hessian)
    return load_imatrix(matrix, hessian)


@contextmanager
def _rounding(
    model: Path,
    small: Path,
    imatrix: Imatrix,
    names: tuple[str, ...] = NAMES,
    **changed: Any,
) -> Iterator[LayerRounding]:
    options = {"encoder_name": "gptq", "imatrix": imatrix, "tokens": "mix", "n_sequences": 10,
               "n_ctx": N_CTX, "threads": 2, **changed}  # fmt: skip
    with (
        open_gguf(model) as source,
        open_gguf(small) as quantized,
        LayerRounding(source, quantized, small.parent, names, **options) as rounding,
    ):
        yield rounding


def _streams(model: Path, small: Path | None, ids: np.ndarray, folder: Path) -> np.ndarray:
    """Return the last layer's output of the model, its weights as the quantized file has them."""
    with (
        open_gguf(model) as source,
        PatchedModel(source, folder, n_ctx=N_CTX, n_threads=2) as whole,
    ):
        if small is not None:
            with open_gguf(small) as quantized:
                for tensor in source.tensors:
                    found = quantized.tensor(tensor.name)
                    rows = quantized.read_rows(found, 0, found.n_rows)
                    values = decode_rows(found.type_name, rows, found.row_length)
                    whole.put(tensor, in_type(whole.stored_as(tensor.name), values))
        return whole.residuals(ids, N_LAYERS - 1)


def test_streams_are_those_of_the_model_and_of_the_file_that_was_written(
    model: Path, small: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    before = small.read_bytes()
    with _rounding(model, small, imatrix) as rounding:
        ids = rounding._x[3]
        rounded = [rounding.round(layer)[0] for layer in range(rounding.n_layers)]
        x, x_hat = rounding._x[3], rounding._x_hat[3]
    for layer, names in enumerate(rounded):  # q, k and v share an input, gate and up theirs
        groups = [set(names[:3]), set(names[3:4]), set(names[4:6]), set(names[6:])]
        own = [f"blk.{layer}.{part}.weight" for part in PARTS]
        assert groups == [set(own[:3]), set(own[3:4]), set(own[4:6]), set(own[6:])]
    assert small.read_bytes() != before
    assert np.array_equal(x, _streams(model, None, ids, tmp_path))
    assert np.array_equal(x_hat, _streams(model, small, ids, tmp_path))
    assert not np.array_equal(x, x_hat)


def test_what_the_last_layer_puts_out_is_nearer_to_the_model_s(
    model: Path, small: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    errors = []
    for strength in (0.0, None):  # none of the correction, or what tokens say
        path = tmp_path / f"{strength}.gguf"
        path.write_bytes(small.read_bytes())
        with (
            _rounding(model, path, imatrix, n_sequences=20) as rounding,
            pytest.MonkeyPatch.context() as patch,
        ):
            if strength is not None:
                patch.setattr(ChangedInputs, "strength", lambda *_: 0.0)
            for layer in range(rounding.n_layers):
                rounding.round(layer)
            pairs = zip(rounding._x, rounding._x_hat, strict=True)
            errors.append(float(np.mean([np.square(a - b).mean() for a, b in pairs])))
    assert errors[1] < 0.9 * errors[0]


def test_only_named_tensors_are_rounded_and_the_others_are_met_as_they_are(
    model: Path, small: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    names = ("blk.0.attn_v.weight", "blk.1.ffn_down.weight")
    with open_gguf(small) as file:
        before = {t.name: file.read_rows(t, 0, t.n_rows) for t in file.tensors}
    with _rounding(model, small, imatrix, names) as rounding:
        ids = rounding._x[0]
        assert [rounding.round(k)[0] for k in range(3)] == [names[:1], names[1:], ()]
        x_hat = rounding._x_hat[0]
    with open_gguf(small) as file:
        changed = {
            t.name
            for t in file.tensors
            if not np.array_equal(before[t.name], file.read_rows(t, 0, t.n_rows))
        }
    assert changed == set(names)
    assert np.array_equal(x_hat, _streams(model, small, ids, tmp_path))


def test_a_layer_that_is_skipped_leads_to_the_same_blocks_as_one_that_was_just_rounded(
    model: Path, small: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    again = tmp_path / "again.gguf"
    with _rounding(model, small, imatrix) as rounding:
        found = [rounding.round(0)]
        again.write_bytes(small.read_bytes())
        found += [rounding.round(1), rounding.round(2)]
    with _rounding(model, again, imatrix) as rounding:
        assert rounding.checksum(found[0][0]) == found[0][1]
        rounding.skip(0)
        assert [rounding.round(1), rounding.round(2)] == found[1:]
    assert again.read_bytes() == small.read_bytes()


def test_layers_come_in_order(model: Path, small: Path, imatrix: Imatrix) -> None:
    with (
        _rounding(model, small, imatrix) as rounding,
        pytest.raises(EngineError, match="layer 1 after -1"),
    ):
        rounding.round(1)


def test_a_layer_that_computes_something_else_by_itself_is_refused(
    model: Path, small: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    with _rounding(model, small, imatrix) as rounding:
        rounding.round(0)
        rounding._known[1][5, 3] += 1e-3
        with pytest.raises(EngineError, match="layer 1 by itself computes something else"):
            rounding.round(1)


def test_one_layer_or_one_sequence_is_refused(model: Path, small: Path, imatrix: Imatrix) -> None:
    with (
        pytest.raises(EngineError, match="and two sequences"),
        _rounding(model, small, imatrix, n_sequences=1),
    ):
        pass
