"""Outputs: never an input, never a device, no more readable than what they are made from."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imatrix_samples
import made_documents
import made_results
import ramgguf
from imatrix_samples import floats
from ramgguf.cli import main
from ramgguf.core import corpus, files
from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.core.files import AtomicFile, temporary_path, write_atomically
from ramgguf.core.inputs import protected
from ramgguf.core.line_file import LineFile
from ramgguf.core.user_cache import user_cache
from ramgguf.evaluate.journal import read_results
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.hessian import gram_name, new_hessians
from tiny_models import FEED_FORWARD, WIDTH, write_tiny_model


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ramgguf", *map(str, arguments)]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    return done


def ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[Any, str]:
    """Run the command in this process; return its status, and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["ramgguf", *words])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its curves and a plan."""
    folder = tmp_path_factory.mktemp("made")
    model = write_tiny_model(folder / "m.gguf")
    measured = ramgguf.measure(model, threads=1)
    measured.save(folder / "m.rd.json")
    ramgguf.plan(measured, "50%", min_sqnr_db=0).save(folder / "plan.json")
    return folder


COMMANDS = (
    "measure m.gguf -o m.gguf",
    "recipe m.gguf -o m.gguf",
    "card m.gguf -o m.gguf",
    "calibrate m.gguf -o m.gguf",
    "sensitivity m.gguf -o m.gguf",
    "plan m.rd.json --budget 50% --min-sqnr 0 -o m.rd.json",
    "curve m.rd.json --min-sqnr 0 --svg m.rd.json",
    "curve m.rd.json --min-sqnr 0 -o m.rd.json",
    "quantize m.gguf --plan plan.json -o plan.json",
    "quantize m.gguf --plan plan.json -o m.gguf",
    "quantize m.gguf --plan plan.json -o q.gguf --save-plan m.gguf",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["itself", "a link", "a hard link"])
def test_force_never_destroys_an_input(made: Path, tmp_path: Path, command: str, name: str) -> None:
    inputs = {}
    for path in made.iterdir():
        inputs[path.name] = path.read_bytes()
        (tmp_path / path.name).write_bytes(inputs[path.name])
    verb, *words = command.split()
    output = words[-1]
    if name == "a link":
        (tmp_path / "other").symlink_to(tmp_path / output)
    elif name == "a hard link":
        (tmp_path / "other").hardlink_to(tmp_path / output)
    if name != "itself":
        words[-1] = "other"
    done = run(verb, *words, "--force", cwd=tmp_path, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "is an input of this command" in done.stderr or "is the source" in done.stderr
    assert {n: (tmp_path / n).read_bytes() for n in inputs} == inputs


TWICE = (
    "quantize m.gguf --plan plan.json -o q.gguf --save-plan q.gguf",
    "quantize m.gguf --plan plan.json -o q.gguf --save-plan ./q.gguf",
    "quantize m.gguf --plan plan.json -o q.gguf --save-plan p.json --export-tensor-types p.json",
    "plan m.rd.json --budget 50% --min-sqnr 0 -o p.json --export-tensor-types p.json",
    "curve m.rd.json --min-sqnr 0 -o c.json --svg c.json",
    "recipe m.gguf -o r.json --export-tensor-types r.json",
    "calibrate m.gguf -o i.gguf --hessian i.gguf",
    "eval m.gguf --protocol llama -o j.jsonl --save-logits j.jsonl",
)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("command", TWICE)
def test_two_outputs_are_never_one_file(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    forced: bool,
) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    words = [*command.split(), *["--force"] * (forced and not command.startswith("eval"))]
    monkeypatch.chdir(tmp_path)
    code, said = ended(monkeypatch, capsys, *words)
    assert code == 1
    assert "is named for two outputs" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [
        "quantize m.gguf --plan plan.json -o q.gguf --save-plan none/p.json",
        "quantize m.gguf --plan plan.json -o none/q.gguf",
        "measure m.gguf -o none/m.json",
        "calibrate m.gguf -o none/i.gguf",
    ],
)
def test_a_folder_that_is_not_there_is_said_before_any_work(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    code, said = ended(monkeypatch, capsys, *command.split())
    assert code == 1
    assert "there is no folder none" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["measure", "sensitivity"])
@pytest.mark.parametrize("model", ["nowhere/m.gguf", "https://huggingface.co/org/repo"])
def test_a_model_that_is_not_there_is_named_not_its_outputs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, model: str
) -> None:
    code, said = ended(monkeypatch, capsys, command, model)
    assert code == 1
    assert "there is no folder" not in said
    assert "is no file" in said or "is an address, not a file" in said, said


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    folder = user_cache("speeds")
    assert folder.is_relative_to(tempfile.gettempdir())
    assert folder.parts[-2:] == (f"ramgguf-{os.getuid()}", "speeds")


def test_a_plan_never_replaces_the_model_whose_name_follows_from_it(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes((made / "m.gguf").read_bytes())
    done = run("quantize", "m.gguf", "--plan", made / "plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("m-ram-*.gguf")
    model = written.read_bytes()
    written.unlink()
    done = run(
        "quantize", "m.gguf", "--plan", made / "plan.json", "--save-plan", written, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "is named for two outputs" in done.stderr
    assert written.read_bytes() == model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of input: shards, matrix, Hessians, text, results, readings."""
    folder = tmp_path_factory.mktemp("prepared")
    model = write_tiny_model(folder / "m.gguf")
    whole = write_tiny_model(folder / "whole.gguf")
    ramgguf.quantize(
        whole, "60%", folder / "s.gguf", min_sqnr_db=0, split_max_bytes=30_000, effort="fast"
    )
    whole.unlink()
    weights = {"blk.0.attn_q.weight": WIDTH, "blk.0.ffn_down.weight": FEED_FORWARD}
    sums = {f"{name}.in_sum2": floats(*[1.0] * n) for name, n in weights.items()}
    imatrix_samples.write_gguf(
        folder / "i.gguf", sums | {f"{name}.counts": floats(4.0) for name in weights}
    )
    with new_hessians(
        folder / "h.gguf", {name: name for name in weights}, weights, 4, force=False
    ) as hessians:
        for name, n in weights.items():
            hessians.write(gram_name(name), np.eye(n, dtype=np.float32))
        hessians.commit()
    (folder / "t.txt").write_text("The sea is calm. " * 400)
    plan = ramgguf.plan(ramgguf.measure(model, threads=1), "60%", min_sqnr_db=0)
    plan.save(folder / "p.json")
    ramgguf.quantize(model, output=folder / "c.gguf", from_plan=plan, threads=1)
    with open_gguf(folder / "c.gguf") as file:
        scored = {"n_bytes": file.n_bytes, "header_sha256": file.header_sha256}
    result = made_documents.result()
    result = result.model_copy(update={"model": result.model.model_copy(update=scored)})
    result.save(folder / "r.json")
    made_results.journal(folder / "j.jsonl", result)
    return folder


GPTQ = "--encoder gptq --imatrix i.gguf --hessian h.gguf"
MORE_COMMANDS = (
    "measure {first} -o {second}",
    "recipe {first} -o {second}",
    "card {second} -o {first}",
    "quantize {first} -b 50% --min-sqnr 0 --effort fast -o q.gguf --save-plan {second}",
    "quantize {first} -b 50% --min-sqnr 0 --effort fast -o q.gguf --export-tensor-types {second}",
    "measure m.gguf --imatrix i.gguf -o i.gguf",
    "quantize m.gguf -b 50% --min-sqnr 0 --imatrix i.gguf -o i.gguf",
    "quantize m.gguf -b 50% --min-sqnr 0 --imatrix i.gguf -o q.gguf --save-plan i.gguf",
    "measure m.gguf {gptq} -o h.gguf",
    "quantize m.gguf -b 50% --min-sqnr 0 {gptq} -o h.gguf",
    "quantize m.gguf -b 50% --min-sqnr 0 {gptq} -o q.gguf --save-plan h.gguf",
    "calibrate m.gguf --tokens t.txt --sequences 1 --context 16 -o t.txt",
    "calibrate m.gguf --tokens t.txt --sequences 1 --context 16 -o q.gguf --hessian t.txt",
    "sensitivity m.gguf --tokens t.txt --sequences 1 --context 16 -o t.txt",
    "eval m.gguf --text t.txt --seq-len 16 --n-seq 1 --resume -o t.txt",
    "eval m.gguf --text t.txt --seq-len 16 --n-seq 1 --resume -o m.gguf",
    "report r.json -o r.json",
    "report j.jsonl -o j.jsonl",
    "report r.json --plan p.json -o p.json",
    "card c.gguf --results r.json -o r.json",
    "card c.gguf --results j.jsonl -o j.jsonl",
    "card c.gguf --plan p.json -o p.json",
)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("command", MORE_COMMANDS)
def test_no_input_of_any_kind_is_an_output(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    forced: bool,
) -> None:
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shards = sorted(path.name for path in tmp_path.glob("s-*"))
    words = command.format(first=shards[0], second=shards[1], gptq=GPTQ).split()
    if forced and words[0] != "eval":  # which adds to its output
        words.append("--force")
    monkeypatch.chdir(tmp_path)
    code, said = ended(monkeypatch, capsys, *words)
    assert (code, said.count("error: ")) == (1, 1), said
    if forced:
        assert "is an input of this command" in said or "is the source" in said, said
    else:
        assert "exists" in said or "is an input" in said or "is no line of JSON" in said, said
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_journal_is_no_output_of_the_run_that_reads_or_writes_it(tmp_path: Path) -> None:
    made_results.journal(tmp_path / "read", made_documents.result())
    with protected():
        read_results(tmp_path / "read")
        file = LineFile(tmp_path / "written", error=PlanError)
        try:
            for name in ("read", "written"):
                with pytest.raises(PlanError, match="is an input of this command"):
                    write_atomically(tmp_path / name, b"x", error=PlanError)
        finally:
            file.close()
        LineFile(tmp_path / "other", error=PlanError).close()


def test_a_parquet_file_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(corpus, "dataset", lambda *_, **__: corpus.Corpus("t", "x"))
    with protected():
        corpus.text_file(path)
        with pytest.raises(PlanError, match="is an input of this command"):
            write_atomically(path, b"x", error=PlanError)


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to(tmp_path / "folder")
    (tmp_path / "to_nothing").symlink_to(tmp_path / "nowhere")
    for path, said in (
        (tmp_path / "fifo", "a FIFO"),
        (Path("/dev/null"), "a device"),
        (tmp_path / "to_folder", "a folder"),
        (tmp_path / "to_nothing", "a link to nothing"),
        (Path("-"), "an output is a file"),
    ):
        with pytest.raises(PlanError, match=said):
            write_atomically(path, b"x", error=PlanError)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_to_a_file_stays_and_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"older")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"newer", error=PlanError)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"newer"


def test_an_output_is_no_more_readable_than_its_source(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes((made / "m.gguf").read_bytes())
    source.chmod(0o600)
    done = ramgguf.quantize(
        source, "50%", tmp_path / "q.gguf", min_sqnr_db=0, threads=1, effort="fast"
    )
    assert stat.S_IMODE(done.paths[0].stat().st_mode) == 0o600
    source.chmod(0o644)
    again = ramgguf.quantize(
        source, "50%", tmp_path / "r.gguf", min_sqnr_db=0, threads=1, effort="fast"
    )
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(again.paths[0].stat().st_mode) == 0o644 & ~umask


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"older")
    path.chmod(0o640)
    write_atomically(path, b"newer", error=PlanError)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_has_the_temporarys_name_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "folder":
        temporary_path(path).mkdir()
    else:
        temporary_path(path).symlink_to("elsewhere")
    with pytest.raises(PlanError, match=f"is a {kind}; remove it"):
        write_atomically(path, b"x", error=PlanError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary(made: Path, tmp_path: Path, number: int) -> None:
    script = (
        "import time, sys\n"
        "from ramgguf.quantize import write\n"
        "codec_encode = write.codec.encode\n"
        "def slow(*arguments):\n"
        "    time.sleep(0.5)\n"
        "    return codec_encode(*arguments)\n"
        "write.codec.encode = slow\n"
        "from ramgguf.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "q.gguf"
    arguments = [
        "quantize",
        made / "m.gguf",
        "-b",
        "50%",
        "--min-sqnr",
        "0",
        "-t",
        "1",
        "-o",
        out,
        "--effort",
        "fast",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as child:
        for _ in range(600):
            if temporary_path(out).exists():
                break
            time.sleep(0.05)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert signal.Signals(number).name in said
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_output_is_an_error(made: Path) -> None:
    command = f"{sys.executable} -m ramgguf card {made / 'm.gguf'} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: standard output is closed\n"


def test_a_full_standard_output_is_an_error(made: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ramgguf", "recipe", str(made / "m.gguf")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_an_ascii_terminal_shows_what_it_can(made: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = run("plan", made / "m.rd.json", "-b", "50%", "--min-sqnr", "0", env=environment)
    assert done.returncode == 0, done.stderr


def test_blocks_are_reserved_by_fallocate_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emulated(*_: object) -> None:
        raise AssertionError("glibc's emulation writes the file")

    reserved = []
    real = files._fallocate

    def noted(fd: int, n_bytes: int) -> None:
        reserved.append(n_bytes)
        real(fd, n_bytes)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    monkeypatch.setattr(files, "_fallocate", noted)
    file = AtomicFile(tmp_path / "out", 1 << 20, force=False, error=GGUFError)
    try:
        assert reserved == [1 << 20]
        assert os.fstat(file._fd).st_size == 1 << 20
    finally:
        file.abort()


def test_ctrl_c_before_the_new_file_has_its_descriptor_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def interrupted(path: Path, flags: int, *mode: int) -> int:
        fd = opened(path, flags, *mode)
        if flags & os.O_EXCL:
            raise KeyboardInterrupt
        return fd

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicFile(tmp_path / "out", 5, force=False, error=GGUFError)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_nobody_has_any_more_leaves_no_temporary(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "out", 5, force=False, error=GGUFError)
    assert [p.name for p in tmp_path.iterdir()] == [temporary_path(Path("out")).name]
    del file
    assert list(tmp_path.iterdir()) == []
