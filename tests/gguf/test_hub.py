"""Models on the hub: addresses, downloads from a stand-in, its cache offline, provenance."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_copies import write_gguf
from gguf_samples import write_model
from hub_stand_in import COMMIT, StandIn
from ramgguf.core.errors import HubError
from ramgguf.core.values import HubFile
from ramgguf.gguf.hub import beside, origin_of, parse_address
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
REPO, GATED, EMPTY = "acme/tiny-GGUF", "acme/closed", "acme/weights"
HOSTILE = "acme/hostile"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A stand-in with a model as one file and as shards, a gated one, and one without GGUF."""
    folder = tmp_path_factory.mktemp("repo")
    model = write_model(folder / "tiny-f16.gguf", rng=np.random.default_rng(0))
    with open_gguf(model) as file:
        shards = write_gguf(
            folder / "tiny-f16s.gguf", file, {}, {}, lambda *_: (), split_max_bytes=400_000
        )
    assert len(shards) > 2
    files = {model.name: model.read_bytes(), "README.md": b"# tiny"}
    files |= {f"split/{p.name}": p.read_bytes() for p in shards}
    repos = {REPO: files, GATED: files, EMPTY: {"model.safetensors": b"0"}}
    repos[HOSTILE] = {
        "cut.gguf": files[model.name][:300],
        "page.gguf": b"<!DOCTYPE html><html>",
        "\x1b[2J\u202eforged\n.gguf": b"",
    }
    with StandIn(repos, gated=frozenset({GATED})).serving() as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, an empty one; the hub's cache is beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _environment(endpoint: str) -> dict[str, str]:
    """Return the environment with a cache of its own that knows no hub but this one."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**bare, "HF_ENDPOINT": endpoint, "HF_HOME": str(Path.cwd().parent / "cache")}


def run(
    hub: StandIn, *arguments: str | Path, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ramgguf on the stand-in; what environment says is added."""
    done = subprocess.run(
        [RAMGGUF, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**_environment(hub.endpoint), **environment},
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_model_of_the_hub_is_quantized_into_the_current_folder(hub: StandIn, here: Path) -> None:
    address = f"hf://{REPO}/tiny-f16.gguf"
    done = run(
        hub,
        "quantize",
        address,
        "-b",
        "5bpw",
        "--save-plan",
        "p.json",
        "--json",
        "-t",
        "1",
        "--effort",
        "fast",
    )
    (path,) = json.loads(done.stdout)["paths"]
    assert Path(path).resolve().parent == here
    assert {p.name for p in here.iterdir()} == {path, "p.json"}
    plan = Plan.load(here / "p.json")
    assert plan.source.hub == HubFile(repo=REPO, revision=COMMIT, file="tiny-f16.gguf")
    with open_gguf(here / path) as file:
        assert file.n_bytes == plan.n_bytes <= plan.budget
        for key, value in (("repo", REPO), ("revision", COMMIT), ("file", "tiny-f16.gguf")):
            assert file.metadata.string(f"ramgguf.source_{key}") == value
    card = run(hub, "card", path).stdout
    assert f'base_model:\n- "{REPO}"\nbase_model_relation: quantized\n' in card
    assert f"hf://{REPO}@{COMMIT}/tiny-f16.gguf" in card


def test_the_curves_of_a_model_from_the_hub_equal_those_of_the_same_file_here(
    hub: StandIn, here: Path
) -> None:
    (here / "tiny-f16.gguf").write_bytes(hub.repos[REPO]["tiny-f16.gguf"])
    run(hub, "measure", "tiny-f16.gguf", "-o", "local.json", "-t", "1")
    run(hub, "measure", f"hf://{REPO}@v1/tiny-f16.gguf", "-t", "1")
    local = Measurement.load(here / "local.json")
    remote = Measurement.load(here / "tiny-f16.rd.json")
    assert remote.tensors == local.tensors
    assert local.source.hub is None
    assert remote.source.hub == HubFile(repo=REPO, revision=COMMIT, file="tiny-f16.gguf")
    assert remote.n_overhead_bytes > local.n_overhead_bytes  # the keys that say where it is from


def test_all_shards_are_fetched_of_the_same_commit_and_then_never_again(
    hub: StandIn, here: Path
) -> None:
    names = sorted(name for name in hub.repos[REPO] if name.startswith("split/"))
    address = f"hf://{REPO}/{names[1]}"
    hub.requests.clear()
    formats = json.loads(run(hub, "recipe", address, "--json").stdout)
    with_one = run(hub, "recipe", f"hf://{REPO}/tiny-f16.gguf", "--json").stdout
    assert {t["name"] for t in formats["tensors"]} == {
        t["name"] for t in json.loads(with_one)["tensors"]
    }
    fetched = [r for r in hub.requests if r.startswith("GET") and "/split/" in r]
    assert sorted(r.rpartition("/")[2] for r in fetched) == [n.rpartition("/")[2] for n in names]
    assert sum(f"/{COMMIT}/" in r for r in fetched) >= len(names) - 1
    hub.requests.clear()
    run(hub, "recipe", address, "-q")
    assert not [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]
    hub.requests.clear()
    offline = run(hub, "recipe", address, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == formats
    assert hub.requests == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"hf://{REPO}/other.gguf", f"no such file; {REPO} has split/tiny-f16s-00001-of-"),
        (f"hf://{REPO}/split", "names no .gguf file; "),
        (f"hf://{EMPTY}/model.gguf", f"{EMPTY} has no .gguf file at all"),
        (f"hf://{REPO}@v9/tiny-f16.gguf", "no such revision"),
        ("hf://acme/nothing/x.gguf", "no repository acme/nothing, or a private one"),
        (f"hf://{GATED}/tiny-f16.gguf", "is gated; accept its terms at http"),
        ("hf://acme", "expected hf://ORG/REPO or hf://ORG/REPO/FILE.gguf"),
        ("hf://acme/a..b/x.gguf", "hf://acme/a..b"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(hub: StandIn, address: str, said: str) -> None:
    done = run(hub, "measure", address, status=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hf://acme")
    assert said in line
    assert done.stdout == ""
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("cut.gguf", "cut.gguf: "),
        ("page.gguf", "page.gguf: "),
        ("none.gguf", "no such file; "),  # it lists names that would control a terminal
    ],
)
def test_what_the_hub_serves_is_as_hostile_as_any_file(hub: StandIn, file: str, said: str) -> None:
    done = run(hub, "measure", f"hf://{HOSTILE}/{file}", status=1)
    line = done.stderr.removesuffix("\n")
    assert line.startswith("error: ")
    assert said in line
    assert line.isprintable()


@pytest.mark.parametrize(
    "file", ["../../../outside.gguf", "/etc/outside.gguf", "a/../../x.gguf", "a/./x.gguf", "a/.."]
)
def test_an_address_cannot_leave_its_repository(file: str) -> None:
    with pytest.raises(HubError, match="leads out of its repository"):
        parse_address(f"hf://{HOSTILE}/{file}")
    assert parse_address(f"hf://{HOSTILE}/a/..b/x.gguf") is not None


def test_offline_what_is_not_in_the_cache_is_not_asked_for(hub: StandIn) -> None:
    hub.requests.clear()
    done = run(hub, "measure", f"hf://{REPO}/tiny-f16.gguf", status=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to fetch it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_named_in_one_line() -> None:
    code = (
        "import sys, time; time.sleep = lambda _: None\n"  # between huggingface_hub's trials
        "from ramgguf.cli import main; main()"
    )
    nowhere = "http://127.0.0.1:9"
    command = [sys.executable, "-c", code, "measure", f"hf://{REPO}/x.gguf"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_environment(nowhere)
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{nowhere} cannot be reached and the file is not in the cache" in line


def test_python_takes_addresses_as_well(hub: StandIn, here: Path) -> None:
    code = (
        f"import ramgguf; m = ramgguf.measure('hf://{REPO}/tiny-f16.gguf', threads=1)\n"
        "p = ramgguf.plan(m, '5bpw')\n"
        f"q = ramgguf.quantize('hf://{REPO}/tiny-f16.gguf', from_plan=p, threads=1)\n"
        "print(m.source.hub.address, q.paths[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(hub.endpoint),
    )
    address, path = done.stdout.split()
    assert address == f"hf://{REPO}@{COMMIT}/tiny-f16.gguf"
    assert (here / path).is_file()
    assert not Path(path).is_absolute()


def test_without_the_extra_the_error_names_it(hub: StandIn) -> None:
    stub = Path.cwd().parent / "stub"
    stub.mkdir()
    (stub / "huggingface_hub.py").write_text("raise ImportError('not here')")
    done = run(hub, "measure", f"hf://{REPO}/x.gguf", status=1, PYTHONPATH=str(stub))
    assert "pip install 'ramgguf[hub]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_existing_output_is_refused_before_anything_is_fetched(hub: StandIn, here: Path) -> None:
    (here / "tiny-f16.rd.json").write_text("older")
    hub.requests.clear()
    assert "--force" in run(hub, "measure", f"hf://{REPO}/tiny-f16.gguf", status=1).stderr
    assert hub.requests == []


WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._]{0,8}", fullmatch=True)


@given(org=WORDS, name=WORDS, revision=WORDS, folder=WORDS, file=WORDS)
def test_an_address_is_read_as_it_was_written(
    org: str, name: str, revision: str, folder: str, file: str
) -> None:
    wanted = HubFile(repo=f"{org}/{name}", revision=revision, file=f"{folder}/{file}.gguf")
    assert parse_address(wanted.address) == wanted
    assert parse_address(Path(wanted.address)) == wanted  # paths fold slashes
    assert parse_address(f"hf://{wanted.repo}/{wanted.file}") == wanted.model_copy(
        update={"revision": "main"}
    )


def test_revisions_of_pull_requests_have_slashes() -> None:
    found = parse_address("hf://acme/tiny@refs/pr/12/folder/x.gguf")
    assert found == HubFile(repo="acme/tiny", revision="refs/pr/12", file="folder/x.gguf")


@pytest.mark.parametrize("path", ["model.gguf", "/models/hf/x.gguf", "a/hf:x.gguf"])
def test_paths_are_no_addresses(path: str) -> None:
    assert parse_address(path) is None
    assert origin_of(Path(path)) is None
    assert beside(Path(path), "y.json") == Path(path).with_name("y.json")


@pytest.mark.parametrize("text", ["hf://", "hf://x", "hf://x/", "hf://a@b/c/d.gguf"])
def test_addresses_without_a_repository_are_refused(text: str) -> None:
    with pytest.raises(HubError, match="is no address of a model"):
        parse_address(text)
