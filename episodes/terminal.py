"""What commands print: text that others wrote, without anything in it that a terminal or rich would obey."""

from __future__ import annotations

import re
from typing import Any

import click
from rich.console import Console
from rich.text import Text

# A colour or a move of the cursor, whole, as logs have them; then every other control character but \t and \n.
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """The text without control characters, but for tabs and newlines."""
    return CONTROL.sub("", text)


def echo(text: object, err: bool = False) -> None:
    """Print a line. err: as a complaint"""
    click.echo(plain(str(text)), err=err)


class Plain(Console):
    """A console to which every string is plain text: no markup, no emoji, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options | {"markup": False, "emoji": False})


def console(err: bool = False) -> Console:
    """Where commands print. A pipe has no width: there every word is printed. err: where they complain"""
    found = Plain(highlight=False, stderr=err)
    if not found.is_terminal:
        found.width = 240
    return found
