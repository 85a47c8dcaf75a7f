"""Write the option tables of docs/commands from the command line itself.

usage: python tools/command_docs.py

A page's section "## Options" is replaced as a whole; the other sections are written by hand.
"""

import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from ramgguf.cli.app import app

PAGES = Path(__file__).parent.parent / "docs" / "commands"
SECTIONS = ("What it does", "Example", "Options", "Files", "Pitfalls")
_OPTIONS = re.compile(r"(?<=^## Options\n\n).*?(?=^## )", re.MULTILINE | re.DOTALL)


def commands() -> dict[str, Any]:
    """Return the commands of the command line by name."""
    group: Any = typer.main.get_command(app)
    return {name: c for name, c in group.commands.items() if not c.hidden}


def option_table(name: str) -> str:
    """Return a command's arguments and options as a Markdown table."""
    rows = []
    for parameter in commands()[name].params:
        if parameter.name == "help":
            continue
        spelled = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            spelled = [parameter.metavar or parameter.name.upper()]
        default = parameter.default
        if default is True:
            default = parameter.opts[0]
        shown = "" if default in (None, False, ...) else f" Default: `{default}`."
        rows.append((", ".join(f"`{word}`" for word in spelled), f"{parameter.help or ''}{shown}"))
    lines = ["| option | meaning |", "|---|---|"]
    lines += [f"| {names} | {_cell(meaning)} |" for names, meaning in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([|<>])", r"\\\1", text)


def with_options(name: str, page: str) -> str:
    """Return the page with the command's options as they are."""
    table = option_table(name)
    return _OPTIONS.sub(lambda _: f"{table}\n", page, count=1)


def main() -> int:
    """Rewrite the pages and return the exit status."""
    for name in commands():
        path = PAGES / f"{name}.md"
        if path.exists():
            path.write_text(with_options(name, path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
