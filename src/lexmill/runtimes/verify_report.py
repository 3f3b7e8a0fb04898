"""What `verify` found: one record a check, how one is made, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lexmill.files import write_json


@dataclass(frozen=True)
class Check:
    """One comparison of a runtime with lexmill.

    Attributes:
        runtime: "transformers", or "llama.cpp f16" and so on.
        check: what was compared.
        passed: None when it could not be checked; `detail` says why.
        figure: what was measured; None when nothing was.
        tolerance: the largest figure that passes.
        detail: for a reader: how many cases, and the first that differs.
        ties: tokens of greedy continuations that are not lexmill's, and passed as ties.
        limits: what the runtime does otherwise by its own known rules, which no file can change; a
            sentence each. A check with limits passed, but its answers are not all equal.
    """

    runtime: str
    check: str
    passed: bool | None
    figure: float | None = None
    tolerance: float | None = None
    detail: str = ""
    ties: int = 0
    limits: tuple[str, ...] = ()


def counted(
    runtime: str, check: str, cases: Iterable[tuple[Any, Any, Any]], unit: str, limited: int = 0
) -> Check:
    """A check whose figure is the number of cases in which the runtime's answer is not lexmill's.

    Args:
        cases: (question, lexmill's answer, the runtime's).
        unit: what a case is, in the plural.
        limited: further cases, in which the answers differ by a limit of the runtime.
    """
    total, wrong, first = 0, 0, ""
    for question, expected, answer in cases:
        total += 1
        if answer != expected:
            wrong += 1
            first = first or f"; {short(question)}: {difference(expected, answer)}"
    if not total + limited:
        return Check(runtime, check, None, detail=f"the model has no {unit} to ask for")
    limits = f", {limited} other by the runtime's own rules" if limited else ""
    detail = f"{total - wrong} of {total + limited} {unit} equal{limits}{first}"
    return Check(runtime, check, wrong == 0, wrong, 0, detail)


def difference(expected: Any, answer: Any) -> str:
    """Two answers in words; of texts and rows of ids, from the first position that differs."""
    at = 0
    if type(expected) is type(answer) and isinstance(expected, (str, list)):
        shorter = min(len(expected), len(answer))
        at = next((at for at in range(shorter) if expected[at] != answer[at]), shorter)
        expected, answer = expected[at:], answer[at:]
    place = f"from position {at} " if at else ""
    return f"{place}lexmill {short(expected)}, here {short(answer)}"


def short(value: Any) -> str:
    """A value on part of a line."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


class Diagnosis(NamedTuple):
    """A likely cause of what a runtime was found to do otherwise.

    Attributes:
        runtime: as in `Check`.
        cause: a sentence.
    """

    runtime: str
    cause: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one model, and for each runtime that failed one the causes, likeliest first."""

    model: str
    environment: Mapping[str, str]
    checks: tuple[Check, ...]
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def passed(self) -> bool:
        """At least one check was made, and none failed."""
        made = [check.passed for check in self.checks if check.passed is not None]
        return bool(made) and all(made)

    @property
    def limited(self) -> bool:
        """Whether some check passed up to a limit of the runtime."""
        return any(check.passed and check.limits for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0: all answers are the same, but for ties and limits; 1: one differs; 2: something could not be checked."""
        if any(check.passed is False for check in self.checks):
            return 1
        return 0 if self.passed and all(check.passed for check in self.checks) else 2

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            "passed": self.passed,
            "environment": dict(self.environment),
            "checks": [asdict(check) for check in self.checks],
            "diagnoses": [diagnosis._asdict() for diagnosis in self.diagnoses],
        }

    def write(self, path: Path | str) -> None:
        """Write `to_json` to a file, atomically."""
        write_json(path, self.to_json())

    def table_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows for a table: runtime, check, result ("same*" with ties, "limit"), "figure ≤ tolerance", detail.

        Behind the checks stand the diagnoses, whose check is "likely cause".
        """
        return [
            (
                check.runtime,
                check.check,
                _result(check),
                _comparison(check),
                "; ".join([check.detail, *check.limits]),
            )
            for check in self.checks
        ] + [(runtime, "likely cause", "", "", cause) for runtime, cause in self.diagnoses]


def _result(check: Check) -> str:
    if check.passed and check.limits:
        return "limit"
    words = {True: "same", False: "DIFFERENT", None: "not checked"}
    return words[check.passed] + ("*" if check.passed and check.ties else "")


def _comparison(check: Check) -> str:
    if check.figure is None or check.tolerance is None:
        return ""
    return f"{check.figure:.3g} {'≤' if check.figure <= check.tolerance else '>'} {check.tolerance:.3g}"
