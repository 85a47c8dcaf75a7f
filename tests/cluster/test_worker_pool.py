"""Forward passes on executors: threads, processes, and some that lose tasks or answer wrongly."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ramgguf.cli import eval_commands, model_commands
from ramgguf.cluster import session_cache as tools
from ramgguf.cluster.executors import connected
from ramgguf.cluster.tasks import Done, EngineKey, Failed, RunnerKey, Task
from ramgguf.core.errors import EngineError, PlanError
from ramgguf.evaluate.evaluation import evaluate
from ramgguf.evaluate.journal import read_results
from ramgguf.gguf.identity import FileIdentity, same_file
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import client
from ramgguf.llama.runner_protocol import Compare, Compared
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.sensitivity.result import Sensitivity
from tiny_models import write_tiny_model
from work_samples import measured, plan_and_curves, refined, scored, timeless, untimed

pytest.importorskip("llama_cpp")
Perform = Callable[[Task], Done | Failed]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="F16")


@pytest.fixture(scope="module")
def here(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the journal of a sensitivity measured in this process."""
    folder = tmp_path_factory.mktemp("here")
    measured(model, folder).save(folder / "sensitivity")
    return folder


@pytest.fixture(scope="module")
def expected(here: Path) -> Sensitivity:
    return timeless(Sensitivity.load(here / "sensitivity"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool
    assert not tools.SESSIONS._idle  # a run that is over keeps nothing open here
    assert not tools.SESSIONS._busy


class Through(Executor):
    """An executor that performs tasks at once, through a function that may alter what it likes."""

    def __init__(
        self, through: Callable[[Perform, Task], Done | Failed], n_workers: int = 1
    ) -> None:
        self._through, self._max_workers = through, n_workers

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(self._through(fn, *arguments))
        except Exception as e:
            future.set_exception(e)
        return future


def test_threads_measure_the_same_sensitivity(
    model: Path, tmp_path: Path, expected: Sensitivity, pool: ThreadPoolExecutor
) -> None:
    assert timeless(measured(model, tmp_path, pool)) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]


def test_processes_measure_the_same_sensitivity(
    model: Path, tmp_path: Path, expected: Sensitivity
) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert timeless(measured(model, tmp_path, pool)) == expected


def test_what_was_begun_here_is_finished_elsewhere_and_the_other_way_round(
    model: Path, here: Path, tmp_path: Path, expected: Sensitivity, pool: ThreadPoolExecutor
) -> None:
    lines = (here / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[:9]))
    assert timeless(measured(model, tmp_path, pool)) == expected
    whole = (tmp_path / "journal").read_bytes()
    assert sorted(whole.splitlines()) == sorted(b"".join(lines).splitlines())
    (tmp_path / "journal").write_bytes(b"".join(whole.splitlines(keepends=True)[:12]))
    assert timeless(measured(model, tmp_path)) == expected


def test_a_journal_of_kernels_that_compute_otherwise_is_refused(
    model: Path, here: Path, tmp_path: Path
) -> None:
    text = (here / "journal").read_text()
    mark = '"fingerprint":"'
    start = text.index(mark) + len(mark)
    (tmp_path / "journal").write_text(text[:start] + "0" * 16 + text[start + 16 :])
    with pytest.raises(PlanError, match="computes other logits"):
        measured(model, tmp_path)


@pytest.mark.parametrize("n_losses", [2, 3])
def test_a_task_whose_child_is_killed_thrice_is_a_failure_that_names_it(
    n_losses: int,
    model: Path,
    tmp_path: Path,
    expected: Sensitivity,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, left = "blk.1.ffn_up.weight", [n_losses]
    perform = tools.RunnerTool.perform

    def deadly(self: tools.RunnerTool, request: Any) -> Any:
        if isinstance(request, Compare) and request.changes[:1] == ((name, "Q4_0"),) and left[0]:
            left[0] -= 1
            os.kill(self._child.pid, signal.SIGKILL)
        return perform(self, request)

    monkeypatch.setattr(tools.RunnerTool, "perform", deadly)
    if n_losses < 3:
        assert timeless(measured(model, tmp_path, pool)) == expected
        return
    with pytest.raises(EngineError) as caught:
        measured(model, tmp_path, pool)
    message = str(caught.value)
    assert f"{model}: {name} as Q4_0, sequence 0 and 1: llama.cpp ended with signal SIG" in message
    assert "3 workers lost it" in message


def test_workers_of_different_kinds_are_not_mixed(model: Path, tmp_path: Path) -> None:
    n_done = 0

    def other_cpu(perform: Perform, task: Task) -> Done | Failed:
        nonlocal n_done
        done = perform(task)
        assert isinstance(done, Done)
        n_done += 1
        kernels = {"cpu": "Another CPU"} | ({"system_info": "AVX = 1"} if n_done > 6 else {})
        system = done.worker.system.model_copy(update=kernels if n_done > 3 else {})
        return replace(done, worker=replace(done.worker, name=f"node {n_done}", system=system))

    with pytest.raises(EngineError, match=r"workers compute differently: kernels AVX = 1 on node"):
        measured(model, tmp_path, Through(other_cpu))
    assert n_done > 6  # the name of a CPU alone is no reason


def test_workers_that_compute_other_logits_are_not_mixed(model: Path, tmp_path: Path) -> None:
    def other_logits(perform: Perform, task: Task) -> Done | Failed:
        done = perform(task)
        assert isinstance(done, Done)
        if isinstance(done.answer, Compared):
            n = len(done.answer.fingerprints)
            answer = done.answer.model_copy(update={"fingerprints": ("0" * 16,) * n})
            done = replace(done, answer=answer)
        return done

    with pytest.raises(EngineError, match="other logits of the unchanged model"):
        measured(model, tmp_path, Through(other_logits))


def test_a_worker_that_does_not_see_the_model_is_named_in_one_line(
    model: Path, tmp_path: Path
) -> None:
    tuned = write_tiny_model(tmp_path / "other.gguf", weight_type="F16", noise=0.1)
    data = tuned.read_bytes()
    with open_gguf(model) as file, open_gguf(tuned) as other:
        start = min(t.offset for t in other.tensors)
        head = model.read_bytes()[: min(t.offset for t in file.tensors)]
    tuned.write_bytes(head + data[start:])

    def found_at(path: Path) -> str:
        def elsewhere(perform: Perform, task: Task) -> Done | Failed:
            assert isinstance(task.key, RunnerKey)
            key = replace(task.key, model=replace(task.key.model, path=str(path)))
            return perform(replace(task, key=key))

        with pytest.raises(EngineError) as caught:
            measured(model, tmp_path, Through(elsewhere))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("worker ")
        assert f"(process {os.getpid()}): {path}" in str(caught.value)
        return str(caught.value)

    assert "No such file" in found_at(tmp_path / "missing.gguf")
    assert "is another file: the same header, but other weights" in found_at(tuned)
    shorter = write_tiny_model(tmp_path / "shorter.gguf", n_layers=1, weight_type="F16")
    assert f"{shorter.stat().st_size} bytes, expected {model.stat().st_size}" in found_at(shorter)


def test_a_worker_with_another_version_is_refused(model: Path, tmp_path: Path) -> None:
    def outdated(perform: Perform, task: Task) -> Done | Failed:
        return perform(replace(task, version="0.0.1"))

    with pytest.raises(EngineError, match=r"worker .* has ramgguf .*, expected 0\.0\.1"):
        measured(model, tmp_path, Through(outdated))


def _no_package() -> Exception:
    return ModuleNotFoundError("No module named 'ramgguf'")


def _four_dead() -> Exception:
    killed: Exception = pytest.importorskip("distributed.scheduler").KilledWorker("key", None, 3)
    return killed


@pytest.mark.parametrize(
    ("error", "message"),
    [(_no_package, "cannot run ramgguf's tasks"), (_four_dead, "4 workers died")],
)
def test_what_an_executor_cannot_do_is_one_line(
    error: Callable[[], Exception], message: str, model: Path, tmp_path: Path
) -> None:
    raised = error()

    def failing(perform: Perform, task: Task) -> Done | Failed:
        if isinstance(task.request, Compare) and task.request.changes:
            raise raised
        return perform(task)

    with pytest.raises(EngineError, match=message) as caught:
        measured(model, tmp_path, Through(failing))
    assert "\n" not in str(caught.value)


class Interrupting:
    """Progress that is interrupted after so many steps, as by Ctrl-C."""

    def __init__(self, n: int) -> None:
        self._left = n

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, n: int) -> None:
        self._left -= n
        if self._left <= 0:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pass


def test_an_interrupt_cancels_and_closes_and_the_run_can_go_on(
    model: Path, tmp_path: Path, expected: Sensitivity, pool: ThreadPoolExecutor
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(model, tmp_path, pool, Interrupting(3))
    deadline = time.monotonic() + 60
    while tools.SESSIONS._busy and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not tools.SESSIONS._busy  # children in the middle of a pass were ended
    assert (tmp_path / "journal").read_bytes().count(b"\n") < 1 + len(expected.tensors)
    assert timeless(measured(model, tmp_path, pool)) == expected


def test_threads_score_the_same_and_resume_what_was_scored_here(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    models = [write_tiny_model(tmp_path / "base.gguf")]
    models += [write_tiny_model(tmp_path / f"{n}.gguf", noise=n) for n in (0.02, 0.2)]
    journal = tmp_path / "here.jsonl"
    alone = scored(models, journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    part = tmp_path / "there.jsonl"
    part.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert untimed(scored(models, part, pool)) == untimed(alone)
    assert part.read_bytes().count(b"\n") == len(lines)
    data = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(data[: 2 * len(data) // 3]))
    assert untimed(scored(models, part)) == untimed(alone)
    assert [r.cpus for r in alone.results] == [()] * 3


def test_a_sequence_from_another_cpu_of_the_same_kind_is_marked(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")

    def other_cpu(perform: Perform, task: Task) -> Done | Failed:
        done = perform(task)
        assert isinstance(done, Done)
        system = done.worker.system.model_copy(update={"cpu": "Another CPU"})
        return replace(done, worker=replace(done.worker, system=system))

    (result,) = scored([model], tmp_path / "journal", Through(other_cpu)).results
    assert result.complete
    assert set(result.cpus) == {"Another CPU", result.engine.cpu}
    assert read_results(tmp_path / "journal")[0].cpus == result.cpus


def test_a_crash_on_a_worker_leaves_the_other_models_whole(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Path(__file__).parents[1].joinpath("crashing_worker.py")
    base = write_tiny_model(tmp_path / "base.gguf")
    near = write_tiny_model(tmp_path / "near.gguf", noise=0.02)
    plain = scored([base, near], tmp_path / "plain", safe_kernels=False)
    monkeypatch.setattr(client, "_WORKER", (sys.executable, str(worker)))
    crashing = write_tiny_model(tmp_path / "crash-3.gguf", noise=0.1)
    got = scored([base, crashing, near], tmp_path / "journal", pool, safe_kernels=False)
    (message,) = got.failures
    assert f"{crashing}: llama.cpp crashed in sequence" in message
    assert "signal SIGSEGV (a bad" in message
    first, crashed, last = untimed(got)
    assert crashed.failure == message
    assert not crashed.complete
    assert [first, last] == untimed(plain)


def test_two_workers_dying_with_a_model_name_the_model_and_the_sequence(tmp_path: Path) -> None:
    models = [write_tiny_model(tmp_path / f"{n}.gguf", noise=n) for n in (0.0, 0.2)]
    killed = type("KilledWorker", (Exception,), {"allowed_failures": 1})

    def dying(perform: Perform, task: Task) -> Done | Failed:
        assert isinstance(task.key, EngineKey)
        if len(task.key.models) == 2 and "sequence" in task.label:
            raise killed
        return perform(task)

    got = scored(models, tmp_path / "journal", Through(dying), safe_kernels=True)
    (message,) = got.failures
    assert message.startswith(f"{models[1]} with {models[0]}: sequence ")
    assert "2 workers died" in message
    assert [r.complete for r in got.results] == [True, False]


@pytest.fixture(scope="module")
def made(model: Path) -> tuple[Plan, Measurement]:
    return plan_and_curves(model)


def test_threads_refine_to_the_same_plan_and_go_on_with_what_was_tried_here(
    model: Path, made: tuple[Plan, Measurement], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    for name in ("alone", "both"):
        (tmp_path / name).mkdir()
    alone = refined(model, made, tmp_path / "alone")
    assert alone.refinement is not None
    assert alone.refinement.n_tried == 6
    refined(model, made, tmp_path / "both", n_trials=2)
    assert refined(model, made, tmp_path / "both", pool) == alone
    journals = [(tmp_path / name / "journal").read_bytes() for name in ("alone", "both")]
    assert journals[0].splitlines()[1:] == journals[1].splitlines()[1:]


def test_idle_workers_look_ahead_and_change_nothing(
    model: Path, made: tuple[Plan, Measurement], tmp_path: Path
) -> None:
    for name in ("alone", "many"):
        (tmp_path / name).mkdir()
    n_passes = 0

    def counting(perform: Perform, task: Task) -> Done | Failed:
        nonlocal n_passes
        n_passes += isinstance(task.request, Compare)
        return perform(task)

    narrow, wide = Through(counting), Through(counting, n_workers=8)
    alone = refined(model, made, tmp_path / "alone", narrow)
    n_alone, n_passes = n_passes, 0
    assert refined(model, made, tmp_path / "many", wide) == alone
    assert n_alone < n_passes < n_alone + 6 * 3 * 2  # some of it was asked for afterwards
    journals = [(tmp_path / name / "journal").read_bytes() for name in ("alone", "many")]
    assert journals[0].splitlines()[1:] == journals[1].splitlines()[1:]


def test_files_are_told_apart_by_their_weights_too(tmp_path: Path) -> None:
    one, two = (write_tiny_model(tmp_path / f"{n}" / "m.gguf", seed=n) for n in _folders(tmp_path))
    with open_gguf(one) as file:
        identity = FileIdentity.of(file)
    same_file(identity).close()
    with pytest.raises(EngineError, match="but other weights"):
        same_file(replace(identity, path=str(two)))


def _folders(parent: Path) -> range:
    for n in range(2):
        (parent / f"{n}").mkdir()
    return range(2)


@pytest.mark.parametrize("name", ["dask:/x:1", "dask://host", "local:0", "threads", "", "local:x"])
def test_executors_that_do_not_exist_are_named(name: str) -> None:
    message = "is neither local:N nor dask://HOST:PORT"
    with pytest.raises(EngineError, match=message), connected(name):
        pass


def test_eval_takes_local_workers_by_name(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    application = typer.Typer()
    eval_commands.register(application)
    arguments = ["eval", str(model), "--text", str(text), "--seq-len", "64", "-t", "1"]
    there, here = (
        CliRunner().invoke(application, [*arguments, "--csv", *extra])
        for extra in (["--executor", "local:2"], [])
    )
    assert there.exit_code == 0, there.output
    assert there.stdout.splitlines()[0] == here.stdout.splitlines()[0]
    assert "m," in there.stdout


def test_quantize_takes_workers_only_for_passes(model: Path) -> None:
    application = typer.Typer()
    model_commands.register(application)
    arguments = ["quantize", str(model), "--budget", "50%", "--executor", "local:2"]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 2
    assert "--refine" in done.output


def test_relative_files_of_logits_are_found_from_other_working_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "base.gguf")
    write_tiny_model(tmp_path / "near.gguf", noise=0.05)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 8)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=os.chdir, initargs=(str(elsewhere),)
    ) as executor:
        saved = evaluate(
            ["base.gguf"],
            save_logits="base.kld",
            text="text.txt",
            n_ctx=64,
            n_seq=2,
            executor=executor,
            threads=1,
        )
        there = evaluate(["near.gguf"], reference_logits="base.kld", executor=executor, threads=1)
    here = evaluate(["near.gguf"], reference_logits="base.kld", threads=1)
    assert (saved.failures, there.failures) == ((), ())
    assert there.results[0].kld_mean == here.results[0].kld_mean
