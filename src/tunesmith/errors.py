"""The error types that users are meant to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.types import Place

Path = tuple[str | int, ...]


class UserError(ValueError):
    """Something the user can mend. The message names the place and the remedy; the CLI prints it without a traceback."""


class PeerError(UserError):
    """Another rank of the run is gone or late, which a new start of all ranks mends: a launcher makes it by itself."""


class DataError(UserError):
    """A record that cannot be used: `file:line:column path: what is wrong: how to mend`.

    `path` leads to the value inside the record, as `("messages", 2, "role")`. Line and column are looked up in the
    file only when the message is asked for.
    """

    def __init__(self, place: Place, path: Path, what: str, remedy: str) -> None:
        super().__init__(place, path, what, remedy)
        self.place, self.path, self.what, self.remedy = place, path, what, remedy

    @property
    def reason(self) -> str:
        """The message without file and line."""
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")
        return f"{path and path + ': '}{self.what}: {self.remedy}"

    def __str__(self) -> str:
        from tunesmith.data.locate import locate

        return f"{locate(self.place, self.path)}{' ' if self.path else ': '}{self.reason}"
