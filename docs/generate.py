"""Write docs/cli.md from the commands' own --help, or check that it is up to date: `python docs/generate.py [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from compiler.cli import cli

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


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/cli.md is not what --help says: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
