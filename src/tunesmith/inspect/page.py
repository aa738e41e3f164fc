"""A view as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tunesmith.inspect.terminal import POSITION_EVERY, VISIBLE, cut_note, strand_title
from tunesmith.inspect.view import Row, Strand, Token, View

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --quiet: #6e7781; --page: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --green: 46, 160, 67; --red: 207, 34, 46; --special: #8250df; --cut: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #7d8590; --page: #0d1117; --card: #161b22;
  --line: #30363d; --green: 63, 185, 80; --red: 255, 123, 114; --special: #d2a8ff; --cut: #ff7b72; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .6rem; color: var(--quiet); }
p { margin: .2rem 0; color: var(--quiet); }
.legend span { margin-right: .8rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; }
.tokens { font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tokens span, .legend .l { border-radius: 3px; padding: .1em 0; }
.tokens span:hover { outline: 2px solid var(--special); }
.n { color: var(--quiet); }
.l { color: var(--text); background: rgba(var(--green), var(--a)); }
.l:nth-child(odd) { background: rgba(var(--green), calc(var(--a) * .8)); }
.w, .w:nth-child(odd) { background: rgba(var(--red), var(--a)); }
.legend .l { background: rgba(var(--green), var(--a)); padding: .1em .4em; }
.s { color: var(--special); font-weight: 600; }
.x { color: var(--quiet); opacity: .6; text-decoration: line-through; }
.e { display: inline-block; width: 3px; height: 1em; vertical-align: -.15em; margin: 0 1px; }
.n.e { background: var(--line); }
.cut { color: var(--cut); font-weight: 600; border-left: 3px solid var(--cut); padding-left: .5em; }
.pad { color: var(--quiet); background: repeating-linear-gradient(45deg, transparent 0 6px, var(--line) 6px 7px);
  border: 1px dashed var(--line); }
sub { color: var(--quiet); font-size: .65em; }
"""


def page(view: View, every_position: bool = False) -> str:
    """The whole file."""
    every = 1 if every_position else POSITION_EVERY
    facts = "".join(f"<p>{escape(fact)}</p>\n" for fact in view.facts)
    rows = "".join(_row(row, view.split, every, len(view.rows) > 1) for row in view.rows)
    title = escape(view.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{facts}{_legend()}{rows}"
        "</body>\n</html>\n"
    )


def _legend() -> str:
    shades = [(1.0, "learnt"), (0.5, "half weight"), (2.0, "double weight")]
    learnt = "".join(f'<span class="l" style="--a:{_alpha(weight):g}">{name}</span>' for weight, name in shades)
    return (
        f'<p class="legend">{learnt}<span class="n">not learnt</span><span class="s">special token</span>'
        '<span class="x">cut off</span><span>hover: token id, position, loss weight</span></p>\n'
    )


def _row(row: Row, split: bool, every: int, several: bool) -> str:
    tokens = sum(len(strand.tokens) for strand in row.strands)
    head = f"<h2>row {row.number} · {tokens:,} tokens, {row.padding:,} padding</h2>\n" if several or row.padding else ""
    padding = f'<section class="pad">{row.padding:,} tokens of padding</section>\n' if row.padding else ""
    return head + "".join(_strand(strand, split, every) for strand in row.strands) + padding


def _strand(strand: Strand, split: bool, every: int) -> str:
    before = after = ""
    if strand.before:
        before = f'{_lost(strand.before)}<span class="cut">{cut_note(len(strand.before), split)}</span>\n'
    if strand.after:
        after = f'\n<span class="cut">{cut_note(len(strand.after), split)}</span> {_lost(strand.after)}'
    body = "".join(_token(token, every) for token in strand.tokens)
    return (
        f'<section><h3>{escape(strand_title(strand))}</h3>\n<div class="tokens">{before}{body}{after}</div></section>\n'
    )


def _token(token: Token, every: int) -> str:
    mark = ""
    if token.position % every == 0 and (token.position or every == 1):
        mark = f"<sub>{token.position}</sub>"
    classes = (
        f"{'l' if token.weight else 'n'}{' w' * (token.weight < 0)}{' s' * token.special}{' e' * (not token.text)}"
    )
    style = f' style="--a:{_alpha(token.weight):g}"' if token.weight else ""
    title = f"token {token.id} · position {token.position} · weight {token.weight:g}"
    return f'{mark}<span class="{classes}"{style} title="{title}">{escape(token.text.translate(VISIBLE))}</span>'


def _lost(tokens: Sequence[Token]) -> str:
    return "".join(
        f'<span class="x" title="token {token.id} · cut off">{escape(token.text.translate(VISIBLE))}</span>'
        for token in tokens
    )


def _alpha(weight: float) -> float:
    """How opaque the color is: pale near 0, full at 2."""
    return round(0.12 + 0.3 * min(abs(weight), 2.0), 3)
