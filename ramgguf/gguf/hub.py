"""Models on the Hugging Face hub: their addresses, their local copies, and where a copy came from.

An address is hf://ORG/REPO[@REVISION]/PATH.gguf, as huggingface_hub itself spells it. Files land in
the hub's cache. What the environment says (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) is read
by huggingface_hub.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ramgguf.core.errors import HubError
from ramgguf.core.values import HubFile
from ramgguf.gguf.shards import shard_paths

# Paths fold the two slashes into one.
_SCHEME = re.compile(r"hf:/{1,2}")
# Revisions have no slash, but for those of pull requests and conversions.
_ADDRESS = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+))?"
    r"(?:/(?P<file>.*))?",
    re.DOTALL,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_NAMES = 12  # of files, in an error


def parse_address(model: str | Path) -> HubFile | None:
    """Return the file that an address names, None for a path; revision is main unless given.

    Raises HubError for an address that is none. One without a file has file "".
    """
    scheme = _SCHEME.match(str(model))
    if scheme is None:
        return None
    text = str(model)[scheme.end() :]
    found = _ADDRESS.fullmatch(text)
    if found is None or ".gguf@" in text:
        raise HubError(
            f"hf://{text} is no address of a model; expected hf://ORG/REPO/FILE.gguf, or with a "
            "revision hf://ORG/REPO@REVISION/FILE.gguf"
        )
    file = found["file"] or ""
    if any(part in ("", ".", "..") for part in file.split("/")[:-1]) or file.endswith("/.."):
        raise HubError(f"hf://{text} leads out of its repository; name a file in it")
    return HubFile(repo=found["repo"], revision=found["revision"] or "main", file=file)


def origin_of(path: Path) -> HubFile | None:
    """Return which file of the hub a path in its cache is; None for any other path."""
    parts = path.absolute().parts
    for i in range(len(parts) - 3):
        kind, *repo = parts[i].split("--", 2)
        snapshot = parts[i + 1] == "snapshots" and _COMMIT.fullmatch(parts[i + 2])
        if kind == "models" and repo and snapshot:
            file = "/".join(parts[i + 3 :])
            return HubFile(repo="/".join(repo), revision=parts[i + 2], file=file)
    return None


def beside(model: Path, name: str) -> Path:
    """Return the path under that name of what is made from a model: beside it, unless it is from
    the hub: then in the current folder.
    """
    if parse_address(model) is not None or origin_of(model) is not None:
        return Path(name)
    return model.with_name(name)


def local_path(model: str | Path, *, quiet: bool = False) -> Path:
    """Return the path of a model, fetched first if an address names it; all shards come along.

    quiet shows no progress. Raises HubError when there is no such file, it cannot be had, or
    huggingface_hub is missing.
    """
    wanted = parse_address(model)
    if wanted is None:
        return Path(model)
    hub = _library()
    with _silenced(hub, bars=quiet):
        if not wanted.file.endswith(".gguf"):
            raise HubError(f"{wanted.address} names no .gguf file; {_listing(hub, wanted)}")
        # The first file tells the commit, the other shards are that commit's.
        pinned = wanted
        for name in shard_paths(Path(wanted.file)):
            path = _download(hub, pinned.model_copy(update={"file": name.as_posix()}))
            pinned = origin_of(path) or pinned
    return path.with_name(Path(wanted.file).name)


@contextmanager
def _silenced(hub: ModuleType, *, bars: bool) -> Iterator[None]:
    """Keep huggingface_hub from logging what is going to be an error's line, and from its bars."""
    verbosity = hub.utils.logging.get_verbosity()
    shown = bars and not hub.utils.are_progress_bars_disabled()
    hub.utils.logging.set_verbosity_error()
    if shown:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.logging.set_verbosity(verbosity)
        if shown:
            hub.utils.enable_progress_bars()


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils  # neither is there without being asked for
    except ImportError as e:
        raise HubError(
            f"huggingface_hub cannot be imported ({e}); pip install 'ramgguf[hub]'"
        ) from None
    library: ModuleType = huggingface_hub
    return library


def _download(hub: ModuleType, wanted: HubFile) -> Path:
    errors = hub.errors
    try:
        return Path(hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except errors.GatedRepoError:
        raise HubError(
            f"{wanted.address}: the repository is gated; accept its terms at "
            f"{hub.constants.ENDPOINT}/{wanted.repo} and log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{wanted.address}: {hub.constants.ENDPOINT} has no repository {wanted.repo}, or a "
            "private one: log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{wanted.address}: {wanted.repo} has no such revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        raise HubError(_unreachable(hub, wanted, e)) from None
    except errors.EntryNotFoundError:
        raise HubError(f"{wanted.address}: no such file; {_listing(hub, wanted)}") from None
    except (OSError, ValueError) as e:  # what the server answered, the disk, a name it refuses
        raise HubError(f"{wanted.address}: {_first_line(e)}") from None


def _unreachable(hub: ModuleType, wanted: HubFile, error: Exception) -> str:
    cache = hub.constants.HF_HUB_CACHE
    if hub.constants.HF_HUB_OFFLINE:
        return (
            f"{wanted.address}: is not in the cache {cache}, and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that, or name a file"
        )
    return (
        f"{wanted.address}: {hub.constants.ENDPOINT} cannot be reached and the file is not in the "
        f"cache {cache} ({_first_line(error.__cause__ or error)})"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listing(hub: ModuleType, wanted: HubFile) -> str:
    """Return which .gguf files the repository has, as far as it can be asked."""
    try:
        files = hub.HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
    except Exception as e:  # whatever the HTTP library raises
        return f"which it has cannot be asked ({_first_line(e)})"
    names = sorted(f for f in files if f.endswith(".gguf"))
    if not names:
        return f"{wanted.repo} has no .gguf file at all"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{wanted.repo} has {', '.join(names[:_MOST_NAMES])}{more}"
