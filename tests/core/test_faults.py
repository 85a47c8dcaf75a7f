"""Faults while working: kills, full disks, unwritable folders, sources that change, two writers.

After each the source is as it was, an older output is intact or fully replaced, nothing is left
behind once the next run is over, and that run writes the bytes that an undisturbed one writes.
`make soak` sets RAMGGUF_KILLS to 50 and more.
"""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import made_documents
import ramgguf
from conftest import fill_disk
from gguf_samples import write_model
from interruptible import unwatched
from ramgguf.core import files
from ramgguf.core.errors import GGUFError, PlanError, RamggufError
from ramgguf.core.files import AtomicFile
from ramgguf.gguf import writer
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.shards import Shard
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.quantize import output_paths
from ramgguf.quants.hessian import gram_name, new_hessians
from ramgguf.quants.imatrix import InputSquares, write_imatrix
from ramgguf.report.page import write_html
from ramgguf.report.results import report_of

KILLS = int(os.environ.get("RAMGGUF_KILLS", "4"))
BUDGET = "6bpw"

# The commands, without the start of the interpreter, which is longer than they are.
_WORK = """
import sys
import ramgguf
command, source, target = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
if command == "quantize":
    ramgguf.quantize(source, "6bpw", target, min_sqnr_db=0, threads=2, force=True, effort="fast")
else:
    from pathlib import Path
    ramgguf.measure(source, threads=2).save(Path(target))
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.gguf"
    return write_model(path, rng=np.random.default_rng(1), n_layers=8)


def _quantize(source: Path, target: Path) -> None:
    ramgguf.quantize(source, BUDGET, target, min_sqnr_db=0, threads=2, force=True, effort="fast")


def _measure(source: Path, target: Path) -> None:
    ramgguf.measure(source, threads=2).save(target)


def _start(command: str, source: Path, target: Path) -> subprocess.Popen[bytes]:
    """Start the command and let it work as soon as everything is imported."""
    arguments = [sys.executable, "-c", _WORK, command, str(source), str(target)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.write(b"go\n")
    process.stdin.flush()
    return process


@dataclass(frozen=True)
class Command:
    name: str
    run: Callable[[Path, Path], None]
    same: Callable[[bytes, bytes], bool]


def _same_measurement(a: bytes, b: bytes) -> bool:
    one, two = (Measurement.from_json(x.decode()).model_copy(update={"seconds": 0}) for x in (a, b))
    return one == two


@pytest.mark.parametrize(
    "command",
    [
        Command("quantize", _quantize, lambda a, b: a == b),
        Command("measure", _measure, _same_measurement),
    ],
    ids=lambda c: c.name,
)
def test_kills_leave_the_source_and_an_older_or_complete_output(
    command: Command, source: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    before = source.read_bytes()
    undisturbed, target = tmp_path / "undisturbed", tmp_path / "target"
    start = time.perf_counter()
    command.run(source, undisturbed)
    seconds = 1.2 * (time.perf_counter() - start)
    expected = undisturbed.read_bytes()
    for fraction in (0, *rng.uniform(0, 1, KILLS - 1)):
        target.write_bytes(b"older")
        with _start(command.name, source, target) as process:
            time.sleep(fraction * seconds)
            process.send_signal(signal.SIGKILL)
        found = target.read_bytes()
        assert found == b"older" or command.same(found, expected)
        assert source.read_bytes() == before
        command.run(source, target)
        assert command.same(target.read_bytes(), expected)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "undisturbed"]


# Ends itself before the n-th change of a folder entry that giving outputs their names takes.
_COMMIT = """
import os, signal, sys
from pathlib import Path
import ramgguf
source, target, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
def counted(function):
    def call(*arguments, **options):
        global seen
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
from ramgguf.gguf.writer import GGUFOutput
commit = GGUFOutput.commit
def commit_and_die(output):
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
    return commit(output)
GGUFOutput.commit = commit_and_die
from ramgguf.plan.result import Plan
plan = Plan.load(Path(sys.argv[4]))
ramgguf.quantize(source, None, target, from_plan=plan, force=True, split_max_bytes=700_000)
"""


def test_shards_of_two_outputs_never_pass_for_one(source: Path, tmp_path: Path) -> None:
    plan = ramgguf.plan(ramgguf.measure(source, encoder="rtn"), "5bpw", min_sqnr_db=0)
    plan.save(tmp_path / "plan")

    def write(plan: Plan, name: str) -> list[bytes]:
        made = ramgguf.quantize(
            source, None, tmp_path / name, from_plan=plan, verify=False, force=True,
            split_max_bytes=700_000,
        )  # fmt: skip
        return [p.read_bytes() for p in made.paths]

    newer = write(plan, "newer.gguf")
    # In as many shards, of the same sizes.
    older = write(plan.model_copy(update={"encoder": "search"}), "target.gguf")
    assert len(older) == len(newer) >= 3
    assert sum(a != b for a, b in zip(older, newer, strict=True)) >= 2
    paths = sorted(tmp_path.glob("target-*"))
    found = []
    for n in range(1, len(newer) + 3):
        for path, content in zip(paths, older, strict=True):
            path.write_bytes(content)
        arguments = [str(source), str(tmp_path / "target.gguf"), str(n), str(tmp_path / "plan")]
        done = subprocess.run([sys.executable, "-c", _COMMIT, *arguments], check=False)
        assert done.returncode == (-signal.SIGKILL if n <= len(newer) + 1 else 0)
        with contextlib.suppress(GGUFError), open_gguf(paths[-1]):
            found.append([p.read_bytes() for p in paths])
    assert found == [older, newer]  # in between, there is no first shard
    assert write(plan, "target.gguf") == newer
    assert not list(tmp_path.glob(".*"))


def test_what_fails_verification_never_gets_the_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target.gguf"
    write_at = AtomicFile.write_at
    damaged = 0

    def damaging(file: AtomicFile, offset: int, *data: bytes | memoryview) -> None:
        nonlocal damaged
        content = bytearray().join(data)
        if len(content) > 50_000:
            content[len(content) // 2] ^= 0x40
            damaged += 1
        write_at(file, offset, bytes(content))

    monkeypatch.setattr(AtomicFile, "write_at", damaging)
    plan = ramgguf.plan(ramgguf.measure(source), "5bpw", min_sqnr_db=0)
    for split in (None, 700_000):
        target.write_bytes(b"older")
        with pytest.raises(GGUFError, match=r"NMSE|bytes differ"):
            ramgguf.quantize(
                source, None, target, from_plan=plan, force=True, split_max_bytes=split
            )
        assert target.read_bytes() == b"older"
        assert [p.name for p in tmp_path.iterdir()] == ["target.gguf"]
    assert damaged


def test_ctrl_c_leaves_nothing_and_says_so_in_one_line(source: Path, tmp_path: Path) -> None:
    undisturbed, target = tmp_path / "undisturbed.gguf", tmp_path / "target.gguf"
    _quantize(source, undisturbed)
    cli = "from ramgguf.cli import main; main()"
    arguments = [
        "quantize",
        str(source),
        "-b",
        BUDGET,
        "-o",
        str(target),
        "--force",
        "-q",
        "--effort",
        "fast",
    ]
    seen = False
    for delay in (0, 0.02):
        target.write_bytes(b"older")
        with subprocess.Popen(
            [sys.executable, "-c", cli, *arguments, "--min-sqnr", "0"],
            stderr=subprocess.PIPE,
            env=unwatched(),
        ) as process:
            assert process.stderr is not None
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if any(tmp_path.glob(".*")):  # it is writing
                    time.sleep(delay)
                    process.send_signal(signal.SIGINT)
                    seen = True
                    break
                time.sleep(0.001)
            stderr = process.stderr.read().decode()
            process.wait()
        assert "Traceback" not in stderr
        assert process.returncode in (0, 1, 130)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["target.gguf", "undisturbed.gguf"]
        assert target.read_bytes() in (b"older", undisturbed.read_bytes())
    assert seen


def test_two_writers_of_one_output_leave_one_whole_output(source: Path, tmp_path: Path) -> None:
    undisturbed, target = tmp_path / "undisturbed", tmp_path / "target"
    _quantize(source, undisturbed)
    writers = [_start("quantize", source, target) for _ in range(3)]
    codes = []
    for started in writers:
        with started:
            codes.append(started.wait())
    assert 0 in codes
    assert target.read_bytes() == undisturbed.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "undisturbed"]


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may write anywhere: be nobody for the test."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


def test_an_unwritable_folder_is_an_error(
    source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    content = source.read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "target").write_bytes(b"older")
    for path in (tmp_path, *tmp_path.parents):  # to be reached by nobody
        if path == tmp_path or path.name.startswith(("pytest-", "popen-")):
            path.chmod(0o755)
    copy = tmp_path / "source.gguf"
    copy.write_bytes(content)
    folder.chmod(0o555)
    request.getfixturevalue("unprivileged")
    with pytest.raises(GGUFError, match="target: cannot be written: Permission denied"):
        _quantize(copy, folder / "target")
    with pytest.raises(PlanError, match="target: cannot be written: Permission denied"):
        _measure(copy, folder / "target")
    assert (folder / "target").read_bytes() == b"older"
    assert [p.name for p in folder.iterdir()] == ["target"]


def _grams(path: Path) -> None:
    with new_hessians(path, {"a": "a"}, {"a": 64}, 10, force=True) as file:
        file.write(gram_name("a"), np.eye(64, dtype=np.float32))
        file.commit()


def _importance(path: Path) -> None:
    entries = {"a": InputSquares(np.ones((1, 2048)), np.ones(1, np.int64))}
    write_imatrix(path, entries, dataset="d", n_chunks=1, chunk_size=1, force=True)


# What writes an output, but for the models and what llama.cpp computes (test_faults_engine.py).
_WRITERS: dict[str, Callable[[Path], None]] = {
    **{d.KIND: d.save for d in made_documents.documents()},
    "page": lambda path: write_html(path, report_of([made_documents.result()])),
    "imatrix": _importance,
    "hessian": _grams,
}


@pytest.mark.parametrize("what", _WRITERS)
def test_no_disk_is_too_full_to_keep_the_older_output(what: str, small_disk: Path) -> None:
    target = small_disk / "target"
    target.write_bytes(b"older")
    fill_disk(small_disk / "filler", leave=0)
    with pytest.raises(RamggufError, match=r"the disk is full|free and the output needs") as caught:
        _WRITERS[what](target)
    assert str(caught.value).startswith(str(small_disk))
    assert str(caught.value).isprintable()
    assert target.read_bytes() == b"older"
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "target"]
    (small_disk / "filler").unlink()
    if what != "page":  # which is larger than the disk
        _WRITERS[what](target)
        assert target.read_bytes() != b"older"


@pytest.mark.parametrize("what", _WRITERS)
def test_what_cannot_be_written_is_named(what: str, tmp_path: Path, read_only: Path) -> None:
    for folder, why in (
        (read_only, "Read-only file system"),
        (tmp_path / "none", "there is no folder|No such file"),
    ):
        with pytest.raises(RamggufError, match=why) as caught:
            _WRITERS[what](folder / "target")
        assert str(caught.value).startswith(str(folder))
    with pytest.raises(RamggufError, match="is a folder"):
        _WRITERS[what](tmp_path)


@pytest.mark.parametrize("what", _WRITERS)
def test_a_second_writer_is_refused_and_the_first_goes_on(what: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    first = AtomicFile(target, 5, force=True, error=PlanError)
    try:
        with pytest.raises(RamggufError, match=r"target: .*another process is writing it"):
            _WRITERS[what](target)
        first.write_at(0, b"first")
        first.commit()
    finally:
        first.abort()
    assert target.read_bytes() == b"first"
    _WRITERS[what](target)
    assert target.read_bytes() != b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("noticed", ["before", "when reserving", "when writing"])
def test_a_full_disk_is_an_error_and_leaves_the_older_output(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    target, filler = small_disk / "target", small_disk / "filler"
    target.write_bytes(b"older")
    fill_disk(filler, leave=1_000_000)

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if noticed != "before":
        monkeypatch.setattr(writer, "require_disk_space", lambda *_, **__: None)
        monkeypatch.setattr(output_paths, "require_disk_space", lambda *_, **__: None)
    if noticed == "when writing":
        monkeypatch.setattr(files, "_fallocate", unsupported)
    message = "needs" if noticed == "before" else "the disk is full"
    with pytest.raises(GGUFError, match=message):
        _quantize(source, target)
    assert target.read_bytes() == b"older"
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "target"]


def test_a_limit_on_the_size_of_files_is_an_error(source: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(GGUFError, match="cannot be written: File too large"):
            _quantize(source, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["cut short", "written to"])
def test_a_source_that_changes_while_it_is_read_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    copy, target = tmp_path / "copy.gguf", tmp_path / "target.gguf"
    copy.write_bytes(source.read_bytes())
    with open_gguf(source) as file:
        plan = ramgguf.quantize(
            source, BUDGET, tmp_path / "x.gguf", min_sqnr_db=0, effort="fast"
        ).plan
        last = file.tensors[-1]
    (tmp_path / "x.gguf").unlink()
    read, n_reads = Shard.read, 0

    def disturbed(shard: Shard, offset: int, buffer: memoryview) -> None:
        nonlocal n_reads
        n_reads += 1
        if n_reads == 2:
            if change == "cut short":
                os.truncate(copy, last.offset + 1)
            else:
                os.utime(copy, ns=(1, 1))
        read(shard, offset, buffer)

    monkeypatch.setattr(Shard, "read", disturbed)
    with pytest.raises(GGUFError, match=r"cut short|changed while"):
        ramgguf.quantize(copy, None, target, from_plan=plan)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.gguf"]
