"""--for ollama: a Modelfile beside the output."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError
from tiny_models import write_tiny_model


def _quantize(*arguments: str) -> str:
    command = ["quantize", "m.gguf", "--min-sqnr", "0", "--effort", "fast", *arguments]
    done = CliRunner().invoke(app, [*command, "--for", "ollama"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_modelfile_names_the_output_and_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(Path("m.gguf"))
    said = _quantize("-b", "60%", "-o", "out.gguf")
    assert Path("out.Modelfile").read_text() == "FROM ./out.gguf\n"
    assert "out.Modelfile: ollama create NAME -f out.Modelfile" in said
    measured = ramgguf.measure("m.gguf", threads=1)
    ramgguf.plan(measured, "60%", min_sqnr_db=0).save(Path("p.json"))
    command = ["quantize", "m.gguf", "--plan", "p.json", "-o", "q.gguf", "--for", "ollama"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Path("q.Modelfile").exists()


def test_the_context_of_the_memory_is_ollamas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    write_tiny_model(Path("m.gguf"))
    _quantize("--memory", "2GB", "--context", "512", "-o", "out.gguf")
    assert Path("out.Modelfile").read_text() == "FROM ./out.gguf\nPARAMETER num_ctx 512\n"


def test_a_modelfile_is_not_overwritten_and_shards_have_none(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    older = tmp_path / "out.Modelfile"
    older.write_text("FROM x")
    with pytest.raises(GGUFError, match=r"out\.Modelfile.*--force"):
        ramgguf.quantize(model, "60%", tmp_path / "out.gguf", min_sqnr_db=0, target="ollama")
    assert not (tmp_path / "out.gguf").exists()
    assert older.read_text() == "FROM x"
    with pytest.raises(PlanError, match="imports one file"):
        ramgguf.quantize(model, "60%", split_max_bytes=10**5, target="ollama")
