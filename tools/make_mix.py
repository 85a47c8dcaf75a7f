"""Write ramgguf/core/data/mix.ndjson: the texts that models are calibrated, gated and scored on.

usage: python tools/make_mix.py FOLDER

FOLDER holds unpacked packages: of Debian 12 debian-handbook, r-cran-janeaustenr, python3.11-doc,
python-sympy-doc, golang-1.19-src, bats and librust-serde-json-dev (dpkg -x PACKAGE.deb FOLDER), of
npm preact and express (tar xzf PACKAGE.tgz -C FOLDER/npm/NAME). Python's own library is read where
it is installed. Licences: ramgguf/core/data/MIX-LICENSES.md.

A line is one document: its domain, its part (calibrate, gate or score), source, licence and text,
or the turns of a chat. No source file serves two parts.
"""

import bz2
import html.parser
import json
import lzma
import re
import struct
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "ramgguf" / "core" / "data" / "mix.ndjson"
PARTS = ("calibrate", "gate", "score")
HANDBOOK = "usr/share/doc/debian-handbook/html"
PYTHON_DOC = "usr/share/doc/python3.11/html/_sources"
SYMPY_DOC = "usr/share/doc/python-sympy-doc/html/_sources"
GO = "usr/share/go-1.19/src"
SERDE = "usr/share/cargo/registry/serde_json-1.0.87/src"
BATS = "usr/lib/bats-core"

# Per part, the sources with the characters that are taken of each.
CODE = {
    "calibrate": (
        ("python", "json/decoder.py textwrap.py heapq.py http/cookies.py sched.py", 3500),
        ("go", "strings/builder.go sort/search.go encoding/csv/reader.go", 3500),
        ("rust", "value/index.rs number.rs", 4500),
        ("js", "preact/package/src/create-element.js preact/package/src/diff/children.js", 4000),
        ("c", "object.h listobject.h unicodeobject.h", 3000),
        ("shell", "formatter.bash warnings.bash", 3500),
    ),
    "gate": (
        ("python", "fnmatch.py queue.py", 2500),
        ("go", "bufio/scan.go", 2500),
        ("rust", "map.rs", 2500),
        ("js", "express/package/lib/view.js", 2500),
        ("c", "bytearrayobject.h tupleobject.h", 1500),
        ("shell", "semaphore.bash", 2000),
    ),
    "score": (
        ("python", "bisect.py configparser.py shlex.py", 3500),
        ("go", "container/list/list.go text/tabwriter/tabwriter.go", 3000),
        ("rust", "read.rs", 4000),
        ("js", "express/package/lib/request.js preact/package/src/component.js", 3000),
        ("c", "dictobject.h pyport.h", 2500),
        ("shell", "preprocessing.bash validator.bash tracing.bash", 2500),
    ),
}
LICENCES = {
    "python": "PSF-2.0",
    "go": "BSD-3-Clause",
    "rust": "MIT OR Apache-2.0",
    "js": "MIT",
    "c": "PSF-2.0",
    "shell": "MIT",
}
MATHEMATICS = {
    "calibrate": (
        "modules/simplify/hyperexpand.rst.txt",
        "modules/physics/vector/vectors.rst.txt",
        "modules/physics/vector/kinematics.rst.txt",
        "modules/integrals/g-functions.rst.txt",
    ),
    "gate": ("modules/physics/vector/fields.rst.txt",),
    "score": (
        "explanation/special_topics/finite_diff_derivatives.rst.txt",
        "modules/physics/mechanics/masses.rst.txt",
        "tutorials/intro-tutorial/calculus.rst.txt",
    ),
}
CHAT = {
    "calibrate": ("programming", "general"),
    "gate": ("extending", "windows"),
    "score": ("library", "design"),
}
PROSE = {
    "calibrate": ("sect.why-gnu-linux", "the-debian-project", "sect.role-of-distributions"),
    "gate": ("sect.follow-debian-news", "sect.becoming-package-maintainer"),
    "score": ("security", "sect.future-of-debian", "sect.development"),
}
NOVELS = {"calibrate": "emma", "gate": "persuasion", "score": "mansfieldpark"}
# A page of the handbook serves one part, whatever the language: its other parts are other pages.
PAGES = {
    "calibrate": ("sect.master-plan", "sect.backup", "sect.how-to-migrate", "sect.kernel-role"),
    "gate": ("sect.regular-upgrades", "sect.hotplug"),
    "score": ("sect.rights-management", "sect.computer-layers", "sect.user-space"),
}
LANGUAGES = (
    "de-DE",
    "fr-FR",
    "es-ES",
    "ja-JP",
    "zh-CN",
    "ru-RU",
    "pt-BR",
    "it-IT",
    "ar-MA",
    "pl-PL",
)
CHARACTERS = {"calibrate": 56_000, "gate": 14_000, "score": 26_000}


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of paragraphs: DocBook's <div class="para">."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_para: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._is_para.append(("class", "para") in attrs)
            if self._is_para[-1]:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._is_para:
            self._is_para.pop()

    def handle_data(self, data: str) -> None:
        if self._is_para and self._is_para[-1]:
            self.found[-1] += data


def page(path: Path) -> str:
    """Return the paragraphs of a page of the handbook."""
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in parser.found)
    return "\n\n".join(p for p in paragraphs if len(p) > 40 and "DocBook" not in p) + "\n"


def cut(text: str, n: int) -> str:
    """Return at most n characters, up to the end of a line."""
    if len(text) <= n:
        return text
    return text[: text.rfind("\n", 0, n) + 1] or text[:n]


def novels(folder: Path) -> dict[str, str]:
    """Return the texts of the package janeaustenr: R's compressed objects, read as strings."""
    base = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata"
    data, at = base.with_suffix(".rdb").read_bytes(), 0
    found: dict[str, str] = {}
    names = iter(("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice"))
    while at < len(data):
        plain, used = _inflate(data[at:])
        at += used
        lines = list(_strings(plain))
        if len(lines) > 5000:
            found[next(names, f"novel{len(found)}")] = "\n".join(lines) + "\n"
    return found


def _strings(plain: bytes) -> Iterator[str]:
    """Yield the strings of a vector: each has a type (…09), a length (−1: none) and its bytes."""
    at = re.search(rb"\x00[\x04\x00]\x00\x09", plain)
    i = at.start() if at else len(plain)
    while plain[i + 3 : i + 4] == b"\x09":
        (n,) = struct.unpack(">i", plain[i + 4 : i + 8])
        yield plain[i + 8 : i + 8 + max(0, n)].decode("utf-8", "replace")
        i += 8 + max(0, n)


def _inflate(data: bytes) -> tuple[bytes, int]:
    kind = data[4:5]
    if kind == b"2":
        tool: Any = bz2.BZ2Decompressor()
        start = 5
    elif kind == b"Z":
        tool, start = lzma.LZMADecompressor(lzma.FORMAT_AUTO), 5
    else:
        tool, start = zlib.decompressobj(), 4
    plain = tool.decompress(data[start:])
    return plain, len(data) - len(tool.unused_data)


def chats(text: str) -> Iterator[list[dict[str, str]]]:
    """Yield the questions of a FAQ with their answers, two or three to a conversation."""
    text = re.sub(r":\w+:`~?([^`<]+?)(?: <[^`>]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<]+) <[^`>]*>`_+", r"\1", text)
    parts = re.split(r"^([^\n]+\?)\n-{5,}\n", text, flags=re.MULTILINE)
    turns: list[dict[str, str]] = []
    for question, answer in zip(parts[1::2], parts[2::2], strict=False):
        said = re.split(r"^[^\n]+\n={5,}\n", answer, flags=re.MULTILINE)[0].strip()
        said = re.sub(r"::$", ":", said, flags=re.MULTILINE)
        if not 200 < len(said) < 4000:
            continue
        turns += [
            {"role": "user", "content": re.sub(r"``", "`", question)},
            {"role": "assistant", "content": re.sub(r"``", "`", said)},
        ]
        if len(turns) >= 4:
            yield turns
            turns = []


def code(root: Path, part: str) -> Iterator[dict[str, Any]]:
    folders = {
        "python": Path(sysconfig.get_path("stdlib")),
        "go": root / GO,
        "rust": root / SERDE,
        "js": root / "npm",
        "c": Path(sysconfig.get_path("include")),
        "shell": root / BATS,
    }
    for language, names, n in CODE[part]:
        for name in names.split():
            text = (folders[language] / name).read_text(encoding="utf-8")
            yield {
                "source": f"{language}: {name}",
                "licence": LICENCES[language],
                "text": cut(text, n),
            }


def mathematics(root: Path, part: str) -> Iterator[dict[str, Any]]:
    for name in MATHEMATICS[part]:
        text = (root / SYMPY_DOC / name).read_text(encoding="utf-8")
        yield {
            "source": f"sympy: {name}",
            "licence": "BSD-3-Clause",
            "text": cut(text, {"score": 9000}.get(part, 14_000)),
        }


def chat(root: Path, part: str) -> Iterator[dict[str, Any]]:
    for name in CHAT[part]:
        text = (root / PYTHON_DOC / "faq" / f"{name}.rst.txt").read_text(encoding="utf-8")
        for turns in chats(text):
            yield {"source": f"Python FAQ: {name}", "licence": "PSF-2.0", "turns": turns}


def prose(root: Path, part: str) -> Iterator[dict[str, Any]]:
    novel = novels(root)[NOVELS[part]]
    chapters = re.split(r"\n(?=CHAPTER|Chapter)", novel)[3:]
    share = CHARACTERS[part] // 8
    for i, chapter in enumerate(chapters[:4]):
        text = cut(re.sub(r"(?<!\n)\n(?!\n)", " ", chapter) + "\n", share)
        yield {"source": f"{NOVELS[part]}, chapter {i}", "licence": "public domain", "text": text}
    for name in PROSE[part]:
        text = page(root / HANDBOOK / "en-US" / f"{name}.html")
        yield {
            "source": f"handbook: {name}",
            "licence": "CC-BY-SA-3.0",
            "text": cut(text, 2 * share),
        }


def languages(root: Path, part: str) -> Iterator[dict[str, Any]]:
    for language in LANGUAGES:
        share = CHARACTERS[part] // len(LANGUAGES)
        if language in ("ja-JP", "zh-CN", "pl-PL"):
            share //= 2  # a character there says more, and takes more bytes
        texts = (
            page(path)
            for name in PAGES[part]
            for path in sorted((root / HANDBOOK / language).glob(f"{name}*.html"))
        )
        # A paragraph that nobody has translated is English.
        paragraphs = "\n".join(texts).split("\n\n")
        text = cut("\n\n".join(p.strip() for p in paragraphs if " the " not in p), share)
        yield {"source": f"handbook, {language}", "licence": "CC-BY-SA-3.0", "text": text}


DOMAINS = {
    "prose": prose,
    "code": code,
    "mathematics": mathematics,
    "chat": chat,
    "languages": languages,
}


def limited(documents: Iterable[dict[str, Any]], n: int) -> Iterator[dict[str, Any]]:
    """Yield documents until they have n characters."""
    for document in documents:
        if n <= 0:
            return
        yield document
        n -= len(document.get("text") or str(document.get("turns")))


def main() -> int:
    root = Path(sys.argv[1])
    lines = []
    for domain, read in DOMAINS.items():
        for part in PARTS:
            documents = list(limited(read(root, part), CHARACTERS[part]))
            made = [
                json.dumps({"domain": domain, "part": part, **d}, ensure_ascii=False)
                for d in documents
            ]
            print(domain, part, len(made), "documents", sum(map(len, made)), "characters")
            lines += made
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT, OUT.stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
