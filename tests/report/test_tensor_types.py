"""What is exported for llama-quantize, given to llama.cpp's own quantizer."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_quantize
import ramgguf
from made_plans import SOURCE
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan.recipes import Recipe, RecipeTensor
from ramgguf.plan.result import Plan
from ramgguf.quants import formats
from ramgguf.report.tensor_types import NEEDING_IMATRIX, imatrix_note, recipe_types, tensor_types
from small_models import ARCHITECTURES, UNTIED, Architecture, write_small_model

LLAMA, MOE, MLA = (
    next(a for a in ARCHITECTURES if a.name == name) for name in ("llama", "qwen3moe", "deepseek2")
)
# Names with what a pattern file cannot hold, in F32; their rows suit no smaller format.
ODD = {f"blk.1.{odd}conv1d.weight": (4, 48) for odd in ("X", "a=b_", "c d", "é")}


def _plan(model: Path, names: Sequence[str]) -> Plan:
    """Return a plan that gives the formats in turn to the tensors that they suit."""
    measured = ramgguf.measure(model, formats=names, threads=1)
    turns, pins = cycle(names), []
    for tensor in measured.tensors:
        fitting = {p.format for p in tensor.points} & set(names)
        if fitting and tensor.kept is None:
            taken = next(name for name in turns if name in fitting)
            pins.append(f"^{re.escape(tensor.name)}$={taken}")
    return ramgguf.plan(measured, 10**9, pins=pins, min_sqnr_db=0)


def _quantized_by_llama_cpp(model: Path, types: str) -> dict[str, str]:
    path = model.with_name("types.txt")
    path.write_text(types)
    made = llama_quantize.quantize(
        model, model.with_name("theirs.gguf"), "Q8_0", tensor_types=path, threads=1
    )
    with open_gguf(made) as file:
        return {t.name: t.type_name for t in file.tensors}


@pytest.mark.parametrize(
    "architecture",
    [replace(LLAMA, outside=UNTIED | ODD), MOE, MLA],
    ids=lambda a: str(a.name),
)
def test_llama_cpp_gives_every_tensor_the_planned_format(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = write_small_model(tmp_path / "m.gguf", architecture)
    # TQ1_0 and TQ2_0 want ternary weights.
    unlike = {*NEEDING_IMATRIX, *formats.TERNARY}
    names = [n for n in formats.offered() if n not in unlike]
    plan = _plan(model, names)
    planned = {a.name: a.format for a in plan.assignments}
    assert len(set(planned.values())) > 8
    assert "Q8_0" in planned.values()  # the base: not told apart from what was not named
    assert _quantized_by_llama_cpp(model, tensor_types(plan)) == planned
    assert imatrix_note(tensor_types(plan)) is None


def test_what_the_source_had_quantized_is_left_as_it_is(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "f16.gguf", LLAMA)
    mixed = ["blk.0.ffn_up=Q4_K", "blk.0.attn_q=Q8_0", "^(?!blk.0.(ffn_up|attn_q)).*=F16"]
    kwargs: dict[str, Any] = {"formats": ["Q4_K", "Q8_0"], "threads": 1}
    made = ramgguf.quantize(model, 10**9, tmp_path / "m.gguf", pins=mixed, **kwargs, effort="fast")
    plan = _plan(made.paths[0], ["Q4_0", "Q5_K"])
    planned = {a.name: a.format for a in plan.assignments}
    assert planned["blk.0.ffn_up.weight"] == "Q4_K"
    assert planned["blk.0.attn_q.weight"] == "Q8_0"
    assert _quantized_by_llama_cpp(made.paths[0], tensor_types(plan)) == planned


def test_a_recipe_of_a_file_gives_its_formats_to_another_source(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "m.gguf", LLAMA)
    made = ramgguf.quantize(model, "5bpw", tmp_path / "made.gguf", threads=1, effort="fast")
    recipe = Recipe.read(made.paths[0])
    wanted = {t.name: t.format for t in recipe.tensors}
    assert _quantized_by_llama_cpp(model, recipe_types(recipe)) == wanted


def test_formats_that_need_an_importance_matrix_are_told() -> None:
    def note(**types: str) -> str | None:
        tensors = tuple(
            RecipeTensor(name=f"{k}.weight", role="", format=v, n_weights=256, n_bytes=1)
            for k, v in types.items()
        )
        return imatrix_note(recipe_types(Recipe(path=SOURCE.path, n_bytes=1, tensors=tensors)))

    assert note(ffn_up="IQ2_S", ffn_down="Q4_K", attn_q="IQ3_XXS") == (
        "llama-quantize makes IQ3_XXS, IQ2_S with --imatrix only"
    )
    assert note(token_embd="IQ2_S", output="IQ1_S", ffn_up="IQ3_S") is None


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)


@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_the_file_has_a_word_per_tensor_that_survives_the_reading(names: list[str]) -> None:
    tensors = tuple(
        RecipeTensor(name=n, role="", format="Q4_K", n_weights=256, n_bytes=144) for n in names
    )
    lines = recipe_types(Recipe(path="p", n_bytes=1, tensors=tensors))
    words = lines.split()
    assert len(words) == len(names) == lines.count("\n")
    for name, word in zip(names, words, strict=True):
        pattern, _, kind = word.partition("=")
        assert kind == "q4_k"
        assert pattern == pattern.lower()
        assert re.search(pattern.encode(), name.encode())
