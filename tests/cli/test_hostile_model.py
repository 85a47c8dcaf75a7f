"""A model and results whose every name is hostile: no command shows or writes one as it is."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

import made_results
from gguf_samples import finish_gguf
from hostile_text import HOSTILE, hidden
from ramgguf.cli.app import app
from tiny_models import write_tiny_model

# Of a tensor's name the header's scanner refuses controls: the rest is left.
TENSOR_NAMES = (
    "blk.0.ffn_up\u202e.weight",
    "blk.0.\u2066@you\u200b[x](y)\u3164.weight",
    "token_embd.weight",
)
NAME = f"<b>@maintainer [link](https://example.org) {HOSTILE}|`x`"


def _write(path: Path) -> Path:
    rng, out = np.random.default_rng(0), GGUFWriter(path, f"llama{HOSTILE}")
    out.add_name(NAME)
    for key in ("source_repo", "source_revision", "source_file", "version", "plan_sha256"):
        out.add_string(f"ramgguf.{key}", NAME)
    out.add_string("general.license", f"mit{HOSTILE}")
    out.add_uint32("general.base_model.count", 1)
    out.add_string("general.base_model.0.repo_url", NAME)
    for name in TENSOR_NAMES:
        out.add_tensor(name, rng.standard_normal((64, 256)).astype(np.float16))
    finish_gguf(out)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model under a hostile name, and with results of hostile labels."""
    folder = tmp_path_factory.mktemp("hostile")
    _write(folder / "m\u202e\x1b@x.gguf").rename(folder / MODEL)
    ppl, kld = np.linspace(8, 11, 12), np.linspace(0.1, 0.2, 12)
    for label, off in (("one", 0.0), ("two", 0.3)):
        result = made_results.eval_result(label, ppl + off, reference=("f16", ppl - 0.1), kld=kld)
        model = result.model.model_copy(update={"name": NAME, "path": f"{label}{NAME}.gguf"})
        result.model_copy(update={"model": model, "notes": (NAME,)}).save(folder / f"{label}.json")
    (folder / "p.csv").write_text(f'model,ppl,kld_mean\n"{NAME}",9,0.1\n"b{NAME}",8,0.2\n')
    return folder


MODEL = "m\u202e\x1b@x.gguf"
COMMANDS = (
    "measure MODEL -o m.json",
    "measure MODEL -o m2.json --json",
    "plan m.json -b 8bpw --min-sqnr 0 -o plan.json --export-tensor-types t.txt -v",
    "plan m.json -b 8bpw --min-sqnr 0 --json",
    "curve m.json --min-sqnr 0 -b 8bpw -o f.json --svg c.svg",
    "curve m.json --min-sqnr 0 --json",
    "explain plan.json -m m.json",
    "explain plan.json -m m.json --json",
    "quantize MODEL --plan plan.json -o q\u202e.gguf -v",
    "quantize MODEL --plan plan.json -o q2.gguf --json",
    "diff MODEL q2.gguf -v",
    "diff MODEL q2.gguf --json",
    "recipe MODEL -o r.json --export-tensor-types t2.txt",
    "recipe MODEL --json",
    "card q2.gguf --plan plan.json -o card.md",
    "card MODEL",
    "compare one.json two.json",
    "compare one.json two.json --markdown",
    "compare one.json two.json --csv",
    "compare one.json two.json --json",
    "compare p.csv",
    "compare p.csv --markdown",
    "compare p.csv --csv",
    "compare p.csv --json",
    "report one.json two.json plan.json m.json -o r.html",
    "report p.csv -o r2.html",
    "perturb MODEL --like plan.json -o noisy.gguf",
    # What is refused quotes it, too.
    "plan m.json -b 1bpw",
    "explain plan.json '\u202e\x1b' -m m.json",
    "check MODEL",
    "eval MODEL --text one.json",
    "calibrate MODEL",
    "sensitivity MODEL",
)
_REFUSED = ("check", "eval", "calibrate", "sensitivity")


def test_no_command_shows_or_writes_a_hidden_character(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    pytest.importorskip("plotly")
    given = {p.name for p in folder.iterdir()}
    for command in COMMANDS:
        words = [MODEL if w == "MODEL" else w for w in shlex.split(command)]
        done = CliRunner().invoke(app, words)
        said = f"{done.output}{done.exception or ''}"
        assert not hidden(said), (command, ascii(hidden(said)), ascii(said))
        if words[0] not in _REFUSED and "1bpw" not in words and words[1] != "plan.json":
            assert done.exit_code == 0, (command, said)
        if "--json" in words:
            json.loads(done.stdout)
    made = {p for p in folder.iterdir() if p.name not in given}
    texts = {p.name for p in made if p.suffix not in (".gguf", ".partial")}
    expected = "m.json m2.json plan.json t.txt f.json c.svg r.json t2.txt card.md r.html r2.html"
    assert texts == set(expected.split())
    for name in texts:
        text = (folder / name).read_text()
        assert not hidden(text) or name.endswith(".html"), (name, ascii(hidden(text)))
    # In blocks of code nothing is a mention or a link.
    card = re.sub(r"^(`{3,}).*?^\1", "", (folder / "card.md").read_text(), flags=re.M | re.S)
    assert "@maintainer" not in card
    assert "https://example" not in card
    for name in ("r.html", "r2.html"):  # beside what the page brings itself: Plotly
        page = "".join(
            p for p in (folder / name).read_text().split("<script>") if "Plotly" not in p
        )
        assert not hidden(page), (name, ascii(hidden(page)))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp")
def test_what_llama_cpp_says_of_a_model_is_escaped(tmp_path: Path) -> None:
    plain = write_tiny_model(tmp_path / "plain.gguf").read_bytes()
    name = b"tiny plain"
    assert plain.count(name) == 1
    model = tmp_path / "m.gguf"
    model.write_bytes(plain.replace(name, "a\u202e\x1b[2Jbc".encode()))
    (tmp_path / "t.txt").write_text("some words to score, again and again. " * 40)
    size = ["--seq-len", "32", "--n-seq", "1", "--text", str(tmp_path / "t.txt")]
    command = [sys.executable, "-m", "ramgguf", "eval", str(model), *size, "--verbose"]
    done = subprocess.run(command, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    assert "general.name" in said  # llama.cpp lists the metadata
    assert not hidden(said), ascii(hidden(said))
