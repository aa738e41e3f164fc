"""A view in the terminal: learnt tokens on green, the darker the heavier; what is not learnt is dim."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from tunesmith.inspect.view import Row, Strand, Token, View

POSITION_EVERY = 64
LOST_SHOWN = 80
"""So many tokens of what was cut off are shown, those next to the cut."""
WRONG = (255, 180, 175)
"""Red of a step that is marked as wrong, by a loss weight below 0."""
PALE, FULL, DEEP = (226, 245, 231), (150, 222, 165), (46, 160, 67)
"""Green of a loss weight near 0, of 1, and of 2 or more."""
SPECIAL, SPECIAL_LEARNT, LOST, NOTE, POSITION = "bold magenta", "bold #8a008a", "strike bright_black", "red", "blue"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
VISIBLE = {**{code: chr(0x2400 + code) for code in range(32)}, 0x7F: "\u2421", ord("\n"): "⏎\n", ord("\t"): "⇥\t"}
"""Control characters as pictures of themselves: text from a file must not steer the terminal."""


def show_view(console: Console, view: View, every_position: bool = False) -> None:
    """Print it."""
    colors = console.color_system is not None and not console.no_color
    console.print(Text(view.title, "bold"))
    for fact in view.facts:
        console.print(Text(fact, "dim"))
    console.print(_legend(colors))
    for row in view.rows:
        if len(view.rows) > 1 or len(row.strands) > 1 or row.padding:
            console.print()
            console.print(Rule(Text(_row_title(row), "bold"), align="left", characters="━", style="bold"))
        for strand in row.strands:
            console.print()
            console.print(Text(f"── {strand_title(strand)}", "cyan"))
            console.print(_strand(strand, view.split, 1 if every_position else POSITION_EVERY, colors))
        if row.padding:
            console.print()
            console.print(Text(f"░ {row.padding:,} tokens of padding", "bright_black"))


def strand_title(strand: Strand) -> str:
    """The header line of a sequence."""
    says = f", {strand.says}" if strand.says else ""
    sizes = f"{len(strand.tokens):,} tokens, {strand.learnt:,} learnt"
    return f"sequence {strand.number} · {sizes} · sample {strand.sample}{says} · {strand.place}"


def _row_title(row: Row) -> str:
    tokens = sum(len(strand.tokens) for strand in row.strands)
    number = len(row.strands)
    return f"row {row.number} · {number} sequence{'s' * (number > 1)} · {tokens:,} tokens, {row.padding:,} padding"


def cut_note(number: int, split: bool) -> str:
    """What the marker at a cut says."""
    return f"cut here: {number:,} tokens {'are in other samples' if split else 'lost'}"


def _legend(colors: bool) -> Text:
    if not colors:
        return Text("⟦learnt⟧  ⟦0.5: learnt with loss weight 0.5⟧  all else is not learnt  ⁶⁴position")
    return Text("  ").join(
        [
            Text(" learnt ", _learnt(1.0, 0)), Text(" half weight ", _learnt(0.5, 0)), Text(" double weight ", _learnt(2.0, 0)),
            Text("not learnt", "dim"), Text("special token", SPECIAL), Text("cut off", LOST), Text("⁶⁴position", POSITION),
        ]
    )  # fmt: skip


def _strand(strand: Strand, split: bool, every: int, colors: bool) -> Text:
    text = Text()
    if strand.before:
        hidden = len(strand.before) - LOST_SHOWN
        text.append(f"… {hidden:,} more … " if hidden > 0 else "", NOTE)
        _lost(text, strand.before[-LOST_SHOWN:])
        text.append(f" ✂ {cut_note(len(strand.before), split)} ✂\n", NOTE)
    _tokens(text, strand.tokens, every, colors)
    if strand.after:
        text.append(f"\n✂ {cut_note(len(strand.after), split)} ✂ ", NOTE)
        _lost(text, strand.after[:LOST_SHOWN])
        hidden = len(strand.after) - LOST_SHOWN
        text.append(f" … {hidden:,} more" if hidden > 0 else "", NOTE)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _tokens(text: Text, tokens: Sequence[Token], every: int, colors: bool) -> None:
    before = 0.0
    for n, token in enumerate(tokens):
        weight = token.weight
        if not colors and weight != before:
            text.append("⟧" if before else "")
            text.append("⟦" if weight == 1 else f"⟦{weight:g}: " if weight else "")
        before = weight
        if token.position % every == 0 and (token.position or every == 1):
            text.append(str(token.position).translate(SUPERSCRIPT), POSITION)
        style = _learnt(weight, n) if weight else "dim"
        if token.special:
            style = f"{SPECIAL_LEARNT} on {style.partition(' on ')[2]}" if weight else SPECIAL
        _append(text, token.text, style)
    if not colors and before:
        text.append("⟧")


def _append(text: Text, words: str, style: str) -> None:
    """A line break is not painted: its background would run on to the terminal's edge."""
    for n, line in enumerate(words.translate(VISIBLE).split("\n")):
        text.append("\n" if n else "")
        text.append(line, style)


def _lost(text: Text, tokens: Sequence[Token]) -> None:
    for token in tokens:
        _append(text, token.text, LOST)


def _learnt(weight: float, n: int) -> str:
    """Black on a green that deepens with the weight; neighbours differ a little, so that borders of tokens are seen."""
    start, stop, share = (PALE, FULL, weight) if weight <= 1 else (FULL, DEEP, min(weight, 2.0) - 1)
    if weight < 0:
        start, share = WRONG, 0.0
    shade = 1.0 if n % 2 else 0.93
    red, green, blue = (round((a + (b - a) * share) * shade) for a, b in zip(start, stop, strict=True))
    return f"black on #{red:02x}{green:02x}{blue:02x}"
