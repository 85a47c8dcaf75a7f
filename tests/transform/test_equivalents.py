"""The bench's padded and rotated models compute what the original computes, and say of what."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import equivalents
import rotations
from equivalents import EMBEDDING, HEAD, Model, read_model
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.hessian import gram_name, load_hessians, new_hessians
from ramgguf.quants.imatrix import Imatrix, Importance, load_imatrix
from small_models import ARCHITECTURES, N_HEADS, WIDTH, Stored, write_small_model

KNOWN = [a for a in ARCHITECTURES if a.name in equivalents.ARCHITECTURES]


def _small(path: Path, name: str, *, tied: bool = False) -> Path:
    """Write a model in F32 whose first norms have as large an epsilon as a mean square."""

    def stored(name: str, x: np.ndarray) -> Stored | None:
        if tied and name == HEAD:
            return {}
        small = np.float32(0.05) if name == EMBEDDING else np.float32(1)
        return {name: (x * small, GGMLQuantizationType.F32)}

    architecture = next(a for a in KNOWN if a.name == name)
    return write_small_model(path, architecture, tokenizer=True, stored=stored)


def _pad(model: Model) -> None:
    equivalents.pad_heads(model, 2 * N_HEADS)
    equivalents.pad_residual(model, 2 * WIDTH)


def _rotate_padded(model: Model) -> None:
    _pad(model)
    rotations.change(model, "both", 3)
    assert not model.weights[EMBEDDING][:, WIDTH:].any()


def _spread(model: Model) -> None:
    _pad(model)
    rotations.change(model, "spread", 3)
    assert model.weights[EMBEDDING][:, WIDTH:].any()


def _values(model: Model) -> None:
    rotations.change(model, "values", 3)


def _both(model: Model) -> None:
    rotations.change(model, "both", 3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [a.name for a in KNOWN])
@pytest.mark.parametrize("change", [_pad, _values, _both, _rotate_padded, _spread])
def test_a_padded_or_rotated_model_computes_the_same_in_llama_cpp(
    change: Callable[[Model], None], name: str, tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    path = _small(tmp_path / "m.gguf", name, tied=tied)
    with open_gguf(path) as file:
        model = read_model(file)
        before = {n: w.copy() for n, w in model.weights.items()}
        change(model)
        v = "blk.1.attn_v.weight"
        assert before[v].shape != model.weights[v].shape or not np.allclose(
            before[v], model.weights[v], atol=1e-2
        )
        assert (HEAD in model.weights) == (not tied or change not in (_pad, _values))
        equivalents.write_model(model, file, tmp_path / "changed.gguf")
    assert equivalents.exactness(tmp_path / "changed.gguf", path) < 1e-5


@pytest.mark.parametrize("wrong", ["attn_output", "attn_v.bias", "epsilon"])
def test_a_change_that_is_not_undone_is_noticed(wrong: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = _small(tmp_path / "m.gguf", "qwen2")
    with open_gguf(path) as file:
        model = read_model(file)
        before = dict(model.weights)
        if wrong == "epsilon":
            _pad(model)
            del model.keys["qwen2.attention.layer_norm_rms_epsilon"]
        else:
            _values(model)
            for name in before:
                if wrong in name:
                    model.weights[name] = before[name] * (20 if wrong.endswith("bias") else 1)
        equivalents.write_model(model, file, tmp_path / "changed.gguf")
    with pytest.raises(SystemExit, match="computes something else"):
        equivalents.exactness(tmp_path / "changed.gguf", path)


@pytest.mark.parametrize("n", [1, 9, 64, 96, 257])
def test_rotations_are_orthogonal_and_spread_every_channel(n: int) -> None:
    turn = equivalents.orthogonal(n, np.random.default_rng(1))
    assert np.allclose(turn @ turn.T, np.eye(n), atol=1e-5)
    odd = n // (n & -n)
    most = 1 if odd == 1 else min(1.0, 5 / np.sqrt(odd))
    assert np.abs(turn).max() <= most / np.sqrt(n // odd) * (1 + 1e-6)


def test_rows_of_a_padded_model_are_multiples_of_256_in_the_fewest_channels() -> None:
    one = np.ones((9 * 64, 9 * 64), np.float32)
    weights = {
        EMBEDDING: one,
        "blk.0.attn_norm.weight": one[0],
        **{f"blk.0.attn_{x}.weight": one[: (9 if x == "q" else 3) * 64] for x in "qkv"},
        "blk.0.attn_output.weight": one,
    }
    model = Model("llama", weights, n_heads=9, n_kv_heads=3, head_size=64, epsilon=1e-5)
    equivalents.pad(model)
    shapes = {name: w.shape for name, w in model.weights.items()}
    assert shapes["blk.0.attn_q.weight"] == (768, 768)
    assert shapes["blk.0.attn_output.weight"] == (768, 768)
    assert shapes["blk.0.attn_k.weight"] == (192, 768)
    # The fourth head of each group is the new one.
    filled = model.weights["blk.0.attn_output.weight"][0].reshape(3, 4, 64).any(axis=2)
    assert filled.tolist() == [[True, True, True, False]] * 3


def _made_imatrix(
    path: Path, model: Model, rng: np.random.Generator
) -> tuple[Imatrix, dict[str, np.ndarray]]:
    """Return a matrix with Hessians of inputs at random, and these inputs, of layer 0."""
    width = model.width
    mixing = rng.standard_normal((3, width, width))
    owners = {f"blk.0.attn_{x}.weight": "blk.0.attn_q.weight" for x in "qkv"}
    owners |= {f"blk.0.ffn_{x}.weight": "blk.0.ffn_gate.weight" for x in ("gate", "up")}
    owners["blk.0.attn_output.weight"] = "blk.0.attn_output.weight"
    stream = (rng.standard_normal((3, 40, width)) @ mixing).astype(np.float32)
    inputs = dict(zip(dict.fromkeys(owners.values()), stream, strict=True))
    sizes = dict.fromkeys(inputs, width)
    with new_hessians(path, owners, sizes, 40, force=True) as out:
        for name, x in inputs.items():
            out.write(gram_name(name), x.T @ x)
        out.commit()
    of_weights = {name: inputs[owner] for name, owner in owners.items()}
    entries = {n: Importance(n, np.square(x).mean(axis=0)[None]) for n, x in of_weights.items()}
    return Imatrix(path, entries, hessians=load_hessians(path)), of_weights


@pytest.mark.parametrize("change", [_pad, _values, _both, _rotate_padded])
def test_matrix_and_hessians_are_those_of_the_inputs_with_which_the_outputs_are_the_same(
    change: Callable[[Model], None], tmp_path: Path
) -> None:
    with open_gguf(_small(tmp_path / "m.gguf", "llama")) as file:
        model = read_model(file)
    before = dict(model.weights)
    imatrix, of_weights = _made_imatrix(tmp_path / "h.gguf", model, np.random.default_rng(2))
    change(model)
    equivalents.write_matrix(model, imatrix, tmp_path / "i.gguf")
    assert imatrix.hessians is not None
    equivalents.write_hessians(model, imatrix.hessians, tmp_path / "new.gguf")
    hessians = load_hessians(tmp_path / "new.gguf")
    found = load_imatrix(tmp_path / "i.gguf").entries
    assert found.keys() == of_weights.keys()
    for name, x in of_weights.items():
        turn = model.turns.get(name, np.eye(x.shape[1], dtype=np.float32))
        inputs = x @ turn.T
        expected = np.square(inputs).mean(axis=0)
        assert np.allclose(found[name].values[0], expected, rtol=1e-3, atol=1e-4 * expected.mean())
        gram = hessians.get(name, inputs.shape[1])
        assert gram is not None
        assert np.allclose(gram, inputs.T @ inputs, rtol=1e-3, atol=0.04 * expected.mean())
        outputs, now = x @ before[name].T, inputs @ model.weights[name].T
        if name.split(".")[2] in ("ffn_gate", "ffn_up", "attn_k"):
            assert np.allclose(outputs, now, atol=1e-3 * np.abs(outputs).max())
        # Rotated or padded with zeros, outputs are as long as they were.
        lengths, new = (np.square(y).sum(axis=1) for y in (outputs, now))
        assert np.allclose(lengths, new, rtol=1e-3)


def test_a_rotated_model_has_no_matrix_without_hessians(tmp_path: Path) -> None:
    with open_gguf(_small(tmp_path / "m.gguf", "llama")) as file:
        model = read_model(file)
    entry = Importance("blk.0.ffn_up.weight", np.ones((1, WIDTH), np.float32))
    imatrix = Imatrix(tmp_path / "i.gguf", {entry.name: entry})
    _both(model)
    with pytest.raises(SystemExit, match="Hessians"):
        equivalents.write_matrix(model, imatrix, tmp_path / "out.gguf")
