"""Write docs/cli.md from the commands' own --help and docs/codes.md from the table of codes, or check both:
`python docs/generate.py [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from compiler.cli import cli
from targets.codes import CODES

PAGE = Path(__file__).parent / "cli.md"
HEAD = "# Command line\n\nGenerated from `--help` by `make docs`. Exit codes: 0 done or PASS, 1 error, 2 usage, 3 limit exceeded (FAIL), 4 INCONCLUSIVE.\n"


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """(full name, command) of everything below a group, the group first."""
    yield path, group
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, command in commands(cli, "trimtab"):
        context = click.Context(command, info_name=name, max_content_width=110, terminal_width=110)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


CODES_PAGE = Path(__file__).parent / "codes.md"
CODES_HEAD = """# Error codes

Made from `targets/codes.py` by `make docs`. A code stays what it is between versions; the words of an error may change. With `--json` a command that fails
prints `{"error": {"code", "place", "expected", "found", "remedy"}}` on stdout, beside the line on stderr ([errors](errors.md)).

| code | cause |
|---|---|
"""


def codes_page() -> str:
    return CODES_HEAD + "".join(f"| `{code}` | {cause} |\n" for code, cause in CODES.items())


def main() -> int:
    stale = []
    for place, content in ((PAGE, page()), (CODES_PAGE, codes_page())):
        if "--check" not in sys.argv:
            place.write_text(content, encoding="utf-8")
        elif not place.exists() or place.read_text(encoding="utf-8") != content:
            stale.append(place.name)
    if stale:
        print(f"{', '.join(stale)} is not what the code says: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
