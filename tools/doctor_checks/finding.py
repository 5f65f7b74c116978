"""What a check says."""

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """A line of the report; `remedy` says what to do unless all is well."""

    status: Literal["ok", "warning", "problem"]
    subject: str
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """As it is printed."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:8} {self.subject:14} {self.text}{remedy}"


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", subject, text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    """Training runs, but slower or less safely than it could."""
    return Finding("warning", subject, text, remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Training does not run, or its results cannot be trusted."""
    return Finding("problem", subject, text, remedy)
