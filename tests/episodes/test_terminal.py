"""What is printed: all of what others wrote that can be read, and nothing that a terminal or rich would obey."""

import pytest
from rich.table import Table

from episodes.terminal import console, echo, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc ä 漢 🙂", "a\tb\nc ä 漢 🙂"),
        ("\x1b[31mred\x1b[0m \x1b[2J\x1b[1;1Htop", "red top"),
        ("\x1b]0;title\x07\x1b]52;c;aGk=\x1b\\", "]0;title]52;c;aGk=\\"),
        ("\x9b31m\x90\x85 over\rwritten\b\0\x7f", "31m overwritten"),
    ],
)
def test_no_control_character_but_tabs_and_newlines_is_left(text, shown):
    """Of the sequences that logs are full of, colours and moves, nothing is; of others what can be read."""
    assert plain(text) == shown


def test_a_console_prints_what_it_is_given_as_it_is(capsys):
    """No markup and no emoji, in lines, rules and tables."""
    out, said = console(), "x[/nope] [bold]y[/bold] :warning: \x1b[31mz"
    table = Table(said)
    table.add_row(said)
    out.print(said)
    out.print(said, style="bold")
    out.rule(said)
    out.print(table)
    printed = capsys.readouterr().out
    assert printed.count("x[/nope] [bold]y[/bold] :warning: z") == 5 and "\x1b" not in printed


def test_complaints_are_plain_too(capsys):
    echo("a\x1b[31mb", err=True)
    console(err=True).print("c[/nope]\x1b[31md")
    assert capsys.readouterr().err == "ab\nc[/nope]d\n"
