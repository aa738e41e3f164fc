"""Write the conversations that every side of the benchmark prepares, the same ones each time.

python benchmarks/data_throughput/conversations.py FILE [--count 20000] [--seed 0]

The text means nothing, but it tokenizes like chat data: words by falling frequency with rarer derived forms, numbers,
lists, code, and some accented and CJK text. A third of the conversations have a system message; each has one to four
pairs of turns. Lengths are log-normal: about 400 tokens on average, with a tail beyond 2048.
"""

# ruff: noqa: SIM905 - a list of words reads best as text
from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path
from random import Random

# More frequent words come first: a word's chance falls with its place in the list.
WORDS = """
the of and to a in is that it for you with as are on this be by or from can an not at your if which will have when each
more we one but they all use there two how other then first some these what like its into time has make only new way
should than them been also may most about out many where so would number people over such after different data between
because work used part through need both example used same system set using any small world well order value however
long does good while those must important case point water just even before line name type process given change result
start high state help even form large often place group find problem right year provide learn help common create better
second model without day life user information list another within know think question step public less every since
function simple general above energy school specific several local again power test code city history body language
always end show best possible take service food key early level research field open sure follow read keep area space
called next write during against real message current file market natural value law future main free human company
business include become clear single light table study short build product room free today page word story main answer
support community certain family health effect cost country government music side control machine program team
reason person design rule further quality develop hand move report growth amount idea temperature practice choose check
allow across whole season garden price measure memory network search event risk return network balance surface method
region paper explain customer contain method consider project increase increase plan account compare culture material
option note center class standard strong remember record feature access total require ready depend letter strategy basic
average teacher bread kitchen river mountain ocean engine signal window version account server error chapter sample
protein carbon climate theory budget insurance patient treatment oxygen molecule equation variable integer parameter
algorithm database password interface component framework document analysis architecture environment experience
relationship opportunity responsibility understanding particularly approximately significant traditional appropriate
independent recommended additional temperature ingredients schedule exercise vegetable chocolate restaurant university
literature philosophy democracy parliament revolution century ancient empire medieval sculpture orchestra melody
""".split()
SUFFIXES = ("s", "s", "ed", "ing", "ly", "er", "est", "able", "ness", "ment", "ful", "less", "'s", "ization", "-based")
PREFIXES = ("un", "re", "pre", "non-", "over", "multi", "sub", "self-", "inter", "counter")
NAMES = """
Alice Bob Maria Chen Ahmed Olga Tanaka Smith Garcia Nguyen Kowalski Johnson Paris London Berlin Tokyo Nairobi Toronto
Mumbai Chicago Python Linux Amazon Einstein Shakespeare Newton January March October Monday Friday European Japanese
""".split()
ACCENTED = """
café naïve déjà résumé señor mañana über Straße façade jalapeño crème brûlée São-Paulo Zürich Łódź Málaga fiancée élève
piñata Köln größe année château garçon coração naïveté smörgåsbord Ångström œuvre où être sœur
""".split()
CJK = """
今天天气很好 我想学习编程 请给我一个例子 数据处理 机器学习 谢谢你的帮助 东京都 ありがとうございます 日本語を勉強しています
これは何ですか こんにちは 안녕하세요 감사합니다 한국어 인공지능 北京大学 如何提高效率 データベース
""".split()
CODE = (
    "def {a}_{b}({c}, {d}={n}):",
    "    {a} = [{b} for {b} in {c} if {b} > {n}]",
    "    return {a}.{b}({c}[{n}])",
    "for i in range({n}):",
    '    print(f"{a}: {{{b}_{c}:.2f}}")',
    "import {a}_{b} as {c}",
    "if ({a}.{b} == {n} && !{c}) {{ {d}++; }}",
    "const {a} = await fetch(`/api/{b}/{n}?{c}=true`);",
    "SELECT {a}, COUNT(*) FROM {b}_{c} WHERE {d} >= {n} GROUP BY 1;",
    "    # {a} {b} {c} {d}",
    "$ git checkout -b {a}/{b}-{n} && make {c}",
    '{{"{a}": {n}, "{b}_{c}": ["{d}", null]}}',
)
ROLES = ("You are a helpful assistant.", "You are an expert in {a} and {b}. Answer in {n} words or fewer.")
CONTENT_WORDS = WORDS[WORDS.index("people") :]
WORD_CHANCES = list(accumulate(1 / (place + 12) for place in range(len(WORDS))))


class Writer:
    """Makes up text from one seeded source of chance."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def number(self) -> str:
        digits = self.random.choice((1, 1, 1, 2, 2, 3, 4, 6))
        number = self.random.randrange(10**digits)
        form = self.random.random()
        return f"{number:,}" if form < 0.7 else f"{number}%" if form < 0.85 else f"${number / 100:.2f}"

    def rare_word(self) -> str:
        """A word that is seldom seen: a derived form, a name, a number, or one of another language."""
        kind = self.random.random()
        if kind < 0.55:
            return self.random.choice(CONTENT_WORDS) + self.random.choice(SUFFIXES)
        if kind < 0.65:
            return self.random.choice(PREFIXES) + self.random.choice(CONTENT_WORDS)
        if kind < 0.80:
            return self.random.choice(NAMES)
        if kind < 0.95:
            return self.number()
        return self.random.choice(ACCENTED if kind < 0.985 else CJK)

    def sentence(self) -> str:
        chance = self.random.random
        words = self.random.choices(WORDS, cum_weights=WORD_CHANCES, k=self.random.randint(4, 22))
        words = [self.rare_word() if chance() < 0.16 else word for word in words]
        if chance() < 0.4:
            words[self.random.randrange(len(words) - 1)] += self.random.choice((",", ",", ",", ";", ":", " -"))
        if chance() < 0.08:
            place = self.random.randrange(len(words))
            words[place] = self.random.choice(('"{}"', "({})", "**{}**", "`{}`")).format(words[place])
        text = " ".join(words)
        return text[0].upper() + text[1:] + self.random.choice("......?!")

    def code(self, lines: int) -> str:
        filled = []
        for _ in range(lines):
            a, b, c, d = self.random.sample(CONTENT_WORDS, 4)
            filled.append(self.random.choice(CODE).format(a=a, b=b, c=c, d=d, n=self.random.randrange(500)))
        return "\n".join(["```", *filled, "```"])

    def message(self, words: float) -> str:
        """Paragraphs, lists and code of about `words` words."""
        parts: list[str] = []
        while words > 0:
            kind = self.random.random()
            if kind < 0.06 and words > 40:
                lines = self.random.randint(3, 12)
                parts.append(self.code(lines))
                words -= 6 * lines
            elif kind < 0.16 and words > 40:
                items = [self.sentence() for _ in range(self.random.randint(2, 6))]
                parts.append("\n".join(f"{place}. {item}" for place, item in enumerate(items, 1)))
                words -= 14 * len(items)
            else:
                sentences = [self.sentence() for _ in range(min(self.random.randint(1, 6), int(words / 13) + 1))]
                parts.append(" ".join(sentences))
                words -= 13 * len(sentences)
        return "\n\n".join(parts)

    def conversation(self) -> list[dict[str, str]]:
        messages = []
        if self.random.random() < 1 / 3:
            a, b = self.random.sample(CONTENT_WORDS, 2)
            role = self.random.choice(ROLES).format(a=a, b=b, n=self.random.randrange(20, 400))
            messages.append({"role": "system", "content": role})
        length = self.random.lognormvariate(0, 0.75)
        for _ in range(self.random.choices((1, 2, 3, 4), (55, 23, 13, 9))[0]):
            question = self.message(23 * length * self.random.lognormvariate(0, 0.5))
            answer = self.message(66 * length * self.random.lognormvariate(0, 0.5))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


def write_conversations(path: Path, count: int = 20_000, seed: int = 0) -> None:
    """Write `count` conversations as JSON lines: `{"messages": [{"role": ..., "content": ...}, ...]}`."""
    writer = Writer(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"messages": writer.conversation()}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the benchmark's conversations.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_conversations(arguments.file, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
