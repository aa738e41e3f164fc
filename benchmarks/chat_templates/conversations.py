"""Conversations of each kind, of words that occur once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.types import Message, ToolCall

TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"About {name}.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "A place."}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
    for name in ("weatherfinder", "roadfinder")
)
for tool in TOOLS:
    tool["function"]["parameters"]["properties"]["days"]["description"] = "How many."


@dataclass(frozen=True)
class Conversation:
    """One conversation and how it is learnt."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """Of DataConfig."""
    literal: bool = False
    """Its text spells special tokens."""


def chat(*contents: str, system: str = "") -> tuple[Message, ...]:
    turns = tuple(Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents))
    return (Message("system", system), *turns) if system else turns


def call(*names: str, content: str = "", reasoning: str = "", start: int = 0) -> Message:
    places = ("Oslo", "Lima", "Bern")
    calls = tuple(
        ToolCall(name, {"place": places[start + n], "days": 41 + start + n}, f"callid{start + n:03d}")
        for n, name in enumerate(names)
    )
    return Message("assistant", content, reasoning, calls)


def answer(of: int, content: str, name: str = "weatherfinder") -> Message:
    return Message("tool", content, name=name, call_id=f"callid{of:03d}")


def thinking(thought: str, content: str) -> Message:
    return Message("assistant", content, thought)


SEVERAL = ("ask apple", "say banana", "ask cherry", "say damson", "ask elder", "say fig")
SYSTEM = "be gooseberry"
THINKING = (
    Message("user", "ask apple"), thinking("muse hazel", "say banana"),
    Message("user", "ask cherry"), thinking("muse iris", "say damson"),
)  # fmt: skip
INLINE = "<think>\nmuse {}\n</think>\n\nsay {}"
WEIGHTED = tuple(
    Message(m.role, m.content, weight=weight)
    for m, weight in zip(chat(*SEVERAL), (None, 0.5, None, 0.0, None, None), strict=True)
)
WEIGHTED_USER = (Message("user", "ask apple", weight=0.25), *chat(*SEVERAL)[1:])


def conversations(special: list[str]) -> dict[str, Conversation]:
    """Kind → conversation. `special`: the control tokens that a user writes out."""
    spelt = " and ".join(special)
    ask = Message("user", "ask apple")
    one_call = (ask, call("weatherfinder"), answer(0, "rain quince"), Message("assistant", "say banana"))
    two_calls = (
        ask, call("weatherfinder", "roadfinder"), answer(0, "rain quince"), answer(1, "mud raisin", "roadfinder"),
        Message("assistant", "say banana"),
    )  # fmt: skip
    calls_in_a_row = (
        ask, call("weatherfinder"), answer(0, "rain quince"), call("roadfinder", start=1),
        answer(1, "mud raisin", "roadfinder"), Message("assistant", "say banana"), Message("user", "ask cherry"),
        call("weatherfinder", start=2), answer(2, "sun tangerine"), Message("assistant", "say damson"),
    )  # fmt: skip
    thoughtful_calls = (
        ask, call("weatherfinder", reasoning="muse hazel"), answer(0, "rain quince"), thinking("muse iris", "say banana"),
    )  # fmt: skip
    spelt_call = ToolCall("weatherfinder", {"place": f"{special[0]} Oslo"}, "callid000")
    several = chat(*SEVERAL)
    return {
        "one turn": Conversation(several[:2]),
        "several turns": Conversation(several),
        "system": Conversation(chat(*SEVERAL[:2], system=SYSTEM)),
        "system, several": Conversation(chat(*SEVERAL, system=SYSTEM)),
        "unicode": Conversation(chat("问 apple é", "答 香蕉 🙂👩‍👩‍👧", "🙃 cherry", "cafe\u0301 n\u0303 🇳🇴 है")),
        "empty answer": Conversation(chat("ask apple", "", "ask cherry", "say damson")),
        "white space": Conversation(chat(" ask apple \n", "\n\tsay  banana \n\n", "\task cherry", "  say damson\t")),
        "tool": Conversation(one_call, TOOLS),
        "two calls at once": Conversation(two_calls, TOOLS),
        "calls in a row": Conversation(calls_in_a_row, TOOLS),
        "words and call": Conversation((ask, call("weatherfinder", content="say fig"), *one_call[2:]), TOOLS),
        "reasoning": Conversation(THINKING[:2]),
        "reasoning, several": Conversation(THINKING),
        "reasoning and tool": Conversation(thoughtful_calls, TOOLS),
        "<think>": Conversation(chat("ask apple", INLINE.format("hazel", "banana"))),
        "<think>, several": Conversation(
            chat("ask apple", INLINE.format("hazel", "banana"), "ask cherry", INLINE.format("iris", "damson"))
        ),
        "special tokens as text": Conversation(
            chat(f"apple {spelt} ask", f"say {spelt} banana", f"cherry {spelt} ask", "say damson"), literal=True
        ),
        "special tokens in a call": Conversation(
            (ask, Message("assistant", tool_calls=(spelt_call,)), *one_call[2:]), TOOLS, literal=True
        ),
        "last": Conversation(several, settings={"learn": "last"}),
        "each": Conversation(several, settings={"learn": "each"}),
        "each, reasoning": Conversation(THINKING, settings={"learn": "each"}),
        "all": Conversation(several, settings={"learn": "all"}),
        "weights": Conversation(WEIGHTED),
        "weighted user": Conversation(WEIGHTED_USER),
    }  # fmt: skip
