"""A conversation in the terminal."""

from __future__ import annotations

from rich.console import Console

from tunesmith.inference.generate import Messages, load_generator


def chat(path: str, system: str | None, max_new_tokens: int, temperature: float) -> None:
    """Read a turn, stream the answer, until end of input. `/new` forgets the conversation, `/quit` leaves."""
    console = Console()
    generator = load_generator(path)
    start: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    console.print(f"{path} is listening. /new starts afresh, /quit leaves.", highlight=False, markup=False)
    while (turn := _ask(console)) is not None:
        if turn == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": turn})
        answer = ""
        for piece in generator.stream(generator.prompt(messages), max_new_tokens, temperature):
            console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
            answer += piece
        console.print()
        messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str | None:
    """The next turn that is not empty; None at the end."""
    try:
        while not (turn := console.input("> ", markup=False).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        return None
    return None if turn == "/quit" else turn
