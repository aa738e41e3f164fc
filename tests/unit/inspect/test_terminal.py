import io

import pytest
from rich.console import Console

from tunesmith.inspect.page import page
from tunesmith.inspect.terminal import show_view
from tunesmith.inspect.view import Row, Strand, Token, View
from tunesmith.types import Place


def token(text: str, position: int, weight: float = 0.0, special: bool = False) -> Token:
    return Token(position + 100, text, position, weight, special)


def view(*tokens: Token, before: tuple[Token, ...] = (), after: tuple[Token, ...] = (), split: bool = False) -> View:
    strand = Strand(0, 7, Place("a.jsonl", 3), "", list(tokens), list(before), list(after))
    return View("title", ["fact"], [Row(0, [strand], 0)], split)


def printed(shown: View, color: bool = False, every_position: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=200, force_terminal=color, color_system="truecolor" if color else None, no_color=None
    )
    show_view(console, shown, every_position)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


SHADED = "\x1b[30;48;2;"


def test_learnt_tokens_are_green_and_others_dim() -> None:
    text = printed(view(token("question ", 0), token("answer", 1, 1.0), token(" more", 2, 0.5)), color=True)
    assert "\x1b[2mquestion \x1b[0m" in text
    shades = {weight: printed(view(token("x", 0, weight)), color=True) for weight in (0.25, 0.5, 1.0, 1.5, 2.0, 5.0)}
    backgrounds = [line.split("mx")[0].split(SHADED)[-1] for line in shades.values()]
    greens = [tuple(map(int, shade.split(";"))) for shade in backgrounds]
    assert greens[:5] == sorted(greens[:5], reverse=True)  # the heavier, the darker
    assert len(set(greens)) == 5
    assert greens[4] == greens[5]


def test_without_colours_learnt_tokens_stand_in_brackets() -> None:
    shown = view(token("q", 0), token("a", 1, 1.0), token("b", 2, 1.0), token("c", 3, 0.25), token("d", 4))
    assert printed(shown).splitlines()[-1] == "q⟦ab⟧⟦0.25: c⟧d"


def test_control_characters_cannot_steer_the_terminal() -> None:
    text = printed(view(token("a\x1b[31m\r\t\x07\x7f\n", 0), token("b", 1)))
    assert text.splitlines()[-2:] == ["a␛[31m␍⇥        ␇␡⏎", "b"]


def test_positions() -> None:
    tokens = [token("x", n) for n in range(130)]
    assert printed(view(*tokens)).splitlines()[-1] == "x" * 64 + "⁶⁴" + "x" * 64 + "¹²⁸xx"
    assert printed(view(*tokens[:3]), every_position=True).splitlines()[-1] == "⁰x¹x²x"


@pytest.mark.parametrize("split", [False, True])
def test_the_cut_is_marked_on_either_side(split: bool) -> None:
    before, after = [token("b", n) for n in range(-3, 0)], [token("a", n) for n in range(1, 101)]
    shown = view(token("kept", 0), before=tuple(before), after=tuple(after), split=split)
    what = "are in other samples" if split else "lost"
    assert printed(shown).splitlines()[-3:] == [
        f"bbb ✂ cut here: 3 tokens {what} ✂",
        "kept",
        f"✂ cut here: 100 tokens {what} ✂ " + "a" * 80 + " … 20 more",
    ]
    assert page(shown).count('class="x" title=') == 103


def test_the_page_marks_weights_empty_pieces_and_special_tokens() -> None:
    text = page(view(token("<s>", 0, special=True), token("", 1), token("日", 2, 0.5), token("\n", 3, 1.0)))
    assert '<span class="n s" title="token 100 · position 0 · weight 0">&lt;s&gt;</span>' in text
    assert '<span class="n e" title="token 101 · position 1 · weight 0"></span>' in text
    assert '<span class="l" style="--a:0.27" title="token 102 · position 2 · weight 0.5">日</span>' in text
    assert '<span class="l" style="--a:0.42" title="token 103 · position 3 · weight 1">⏎\n</span>' in text
