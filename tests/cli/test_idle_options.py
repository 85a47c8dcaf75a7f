"""An option that would change nothing is refused, or a note says so."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import made_documents
import ramgguf
from ramgguf.cli.app import app
from tiny_models import write_tiny_model

SIZE = "-b 60% --min-sqnr 0"
# The command, and the option that its usage error (or note, or error) names.
IDLE = (
    (f"plan m.rd.json {SIZE} --model m.gguf", "--model"),
    (f"plan m.rd.json {SIZE} --cache-type q8_0", "--cache-type"),
    (f"plan m.rd.json {SIZE} --parallel 2", "--parallel"),
    (f"plan m.rd.json {SIZE} --ngl 2", "--ngl"),
    (f"plan m.rd.json {SIZE} --context 512", "--context"),
    (f"plan m.rd.json {SIZE} --cpu-formats k", "--cpu-formats"),
    ("plan m.rd.json --memory 1GB --context 64 --cpu-formats k", "--cpu-formats"),
    ("curve m.rd.json --vram 1GB --context 64 --cpu-formats k", "--cpu-formats"),
    ("quantize m.gguf --vram 1GB --context 64 --min-speed 5", "--min-speed"),
    ("quantize m.gguf --vram 1GB --context 64 --check", "--check"),
    ("plan m.rd.json --recipe m.gguf --model m.gguf", "--model"),
    (f"plan m.rd.json {SIZE} --objective nmse --sensitivity s.json", "uses no sensitivity"),
    ("curve m.rd.json --min-sqnr 0 --model m.gguf", "--model"),
    ("curve m.rd.json --min-sqnr 0 --cache-type q8_0", "--cache-type"),
    ("explain plan.json nothere -m m.rd.json --json", "no tensor 'nothere'"),
    (f"quantize m.gguf {SIZE} --sensitivity-time 5s", "--sensitivity-time"),
    (f"quantize m.gguf {SIZE} --cache-type q8_0", "--cache-type"),
    ("quantize m.gguf --plan plan.json --sensitivity-time 5s", "--sensitivity-time"),
    (f"quantize m.gguf {SIZE} --allow-requantize -o q.gguf", "--allow-requantize changed nothing"),
    ("measure m.gguf --allow-requantize -o n.json", "--allow-requantize changed nothing"),
    ("measure m.gguf --formats Q4_K,Q8_0 -o n2.json", "Q4_K suits no tensor"),
    ("calibrate m.gguf --hessian-tensors q", "--hessian-tensors"),
    ("calibrate m.gguf --hessian-memory 1GB", "--hessian-memory"),
    ("sensitivity m.gguf --sequences 1 --time 5s", "--time"),
    ("eval m.gguf --text p.csv --split train", "--split"),
    ("eval m.gguf --text p.csv --resume", "--resume"),
    ("eval m.gguf --text p.csv --protocol llama --seed 3", "--seed"),
    ("eval m.gguf --text p.csv --protocol llama --bos", "--bos"),
    ("compare p.csv --outlier 5", "--outlier"),
    ("compare p.csv --json --csv", "give one of"),
    ("report p.csv --outlier 5 -o r.html", "--outlier"),
    ("check m.gguf --json --markdown", "give one of"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idle")
    measured = ramgguf.measure(write_tiny_model(folder / "m.gguf"), threads=1)
    measured.save(folder / "m.rd.json")
    ramgguf.plan(measured, "60%", min_sqnr_db=0).save(folder / "plan.json")
    (folder / "p.csv").write_text("model,ppl\na,9\nb,8\n")
    made_documents.sensitivity().save(folder / "s.json")
    return folder


@pytest.mark.parametrize(("command", "named"), IDLE, ids=[c for c, _ in IDLE])
def test_an_option_without_effect_is_refused_or_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, named: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, command.split())
    said = " ".join(f"{done.output} {done.exception or ''}".replace("│", " ").split())
    assert named in said
    assert done.exit_code != 0 or "changed nothing" in said or "suits no tensor" in said
