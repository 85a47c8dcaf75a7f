"""The pages: every command has one that names its options; all links lead somewhere."""

import re
from pathlib import Path

import pytest

import command_docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMANDS = command_docs.commands()
GENERAL = {"--help", "--version"}
# What belongs to other programs that the pages show.
FOREIGN = {"--tensor-type-file", "--no-repack", "--user", "--scope"}

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def _page(command: str) -> Path:
    own = command_docs.PAGES / f"{command}.md"
    return own if own.exists() else DOCS / f"{command}.md"


def _options(command: str) -> set[str]:
    spelled = [w for p in COMMANDS[command].params for w in (*p.opts, *p.secondary_opts)]
    return {w for w in spelled if w.startswith("--")} - GENERAL


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


ALL_OPTIONS = set().union(*map(_options, COMMANDS)) | GENERAL | FOREIGN


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_page_with_all_sections_and_options(command: str) -> None:
    text = _page(command).read_text()
    assert text.startswith(f"# {command}: ")
    sections = _sections(text)
    assert tuple(sections) == command_docs.SECTIONS
    for title, content in sections.items():
        assert len(content.strip()) > 40, title
    assert f"ramgguf {command} " in sections["Example"]
    named = set(_OPTION.findall(sections["Options"]))
    assert _options(command) <= named
    # Help texts name other commands' options, too.
    assert named <= ALL_OPTIONS | {"--n-gpu-layers"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if _page(c).parent.name == "commands"])
def test_the_options_of_a_page_are_those_of_the_command_line(command: str) -> None:
    text = _page(command).read_text()
    assert command_docs.with_options(command, text) == text, "run python tools/command_docs.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_in_an_example_is_the_command_s_own(command: str) -> None:
    example = _sections(_page(command).read_text())["Example"]
    calls = re.findall(r"^    \$? ?ramgguf (\w+)(.*)$", example, re.MULTILINE)
    assert calls
    for called, rest in calls:
        assert set(_OPTION.findall(rest)) <= _options(called), called


def test_options_named_in_pages_exist() -> None:
    for path in (*command_docs.PAGES.glob("*.md"), DOCS / "README.md", DOCS / "hub.md"):
        prose = path.read_text().partition("## Options")
        found = set(_OPTION.findall(prose[0])) | set(_OPTION.findall(prose[2]))
        assert found <= ALL_OPTIONS | {"--n-gpu-layers"}, path.name


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    linked = {target for pair in _LINK.findall(index) for target in pair}
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} - {"README.md"}
    assert pages <= linked


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize(
    "page",
    [*DOCS.rglob("*.md"), *ROOT.glob("*.md")],
    ids=lambda p: str(p.relative_to(ROOT).as_posix()),
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for pair in _LINK.findall(page.read_text()):
        target = pair[0] or pair[1]
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = {_anchor(h) for h in _HEADING.findall(path.read_text())}
            assert anchor in headings, f"{page.name}: {target}"
