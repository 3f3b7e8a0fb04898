"""The part of a report that says whether all runtimes agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.recipe import markup

VERDICTS = {True: ("good", "equal"), False: ("bad", "different"), None: ("grey", "not checked")}
TIED = ("good", "equal*")
LIMITED = ("grey", "limit")


def overall_verdict(checks: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    if not checks:
        return markup.ABSENT, "", ""
    passed = [was_equal(check) for check in checks]
    equal, different, unchecked = passed.count(True), passed.count(False), passed.count(None)
    tied, limited = sum(map(was_tied, checks)), sum(map(was_limited, checks))
    equal -= limited
    more = [f"{tied:,} of them up to ties (equal*)"] if tied else []
    if limited:
        more.append(f"{limited:,} up to a limit of the runtime")
    if different:
        more.append(f"{different:,} different")
    if unchecked:
        more.append(f"{unchecked:,} not checked")
    tone = "bad" if different else "good" if equal else "grey"
    if not (different or unchecked):
        more.append("all were checked")
    return f"{equal:,} of {len(checks):,} checks equal", ", ".join(more), tone


def verification(checks: Sequence[Mapping[str, Any]], diagnoses: Sequence[Mapping[str, Any]] = ()) -> str:
    head = '<section id="verify"><h2>Do all runtimes agree?</h2>'
    if not checks:
        return f"{head}<p>{markup.ABSENT}</p></section>"
    runtimes: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        runtimes.setdefault(str(check.get("runtime", "")), []).append(check)
    bodies = []
    for runtime, group in runtimes.items():
        verdict, more, _ = overall_verdict(group)
        rows = "".join(map(check_row, group))
        said = f"{verdict}, {more}" if more.startswith(tuple("0123456789")) else verdict
        bodies.append(
            f'<tbody><tr class="group"><th scope="rowgroup" colspan="5">{markup.escaped(runtime)} '
            f"<span>{said}</span></th></tr>{rows}</tbody>"
        )
    verdict, more, _ = overall_verdict(checks)
    columns = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("check", ""),
            ("result", ""),
            ("figure", ' class="number"'),
            ("tolerance", ' class="number"'),
            ("detail", ""),
        )
    )
    return (
        f"{head}<p>{verdict}; {more}. The same model in different runtimes, compared with lexmill's own. "
        "“Not checked” says nothing either way."
        + (f" {_TIES}" if any(map(was_tied, checks)) else "")
        + "</p>"
        + markup.scrolled(
            "checks of the runtimes", f"<thead><tr>{columns}</tr></thead>{''.join(bodies)}", "checks"
        )
        + _causes(diagnoses)
        + "</section>"
    )


def _causes(diagnoses: Sequence[Mapping[str, Any]]) -> str:
    """What most likely makes a runtime differ, in words."""
    items = "".join(
        f"<li><b>{markup.escaped(str(one.get('runtime', '')))}</b>: {markup.escaped(str(one.get('cause', '')))}</li>"
        for one in diagnoses
    )
    return f"<h3>Likely causes</h3><ul>{items}</ul>" if items else ""


_TIES = (
    "“Equal*”: the texts are not the same at every token, but wherever they part, lexmill keeps the two tokens so "
    "near each other that the rounding of the runtime decides."
)


def check_row(check: Mapping[str, Any]) -> str:
    tone, word = TIED if was_tied(check) else VERDICTS[was_equal(check)]
    if was_limited(check):
        tone, word = LIMITED
    figure, tolerance = (
        "" if check.get(name) is None else markup.show_value(check[name], short=True)
        for name in ("figure", "tolerance")
    )
    limits = check.get("limits") or ()
    detail = "; ".join([str(check.get("detail")), *map(str, limits)]) if limits else check.get("detail")
    return (
        f'<tr><th scope="row">{markup.escaped(check.get("check", ""))}</th>'
        f'<td><span class="tag {tone}">{word}</span></td>'
        f'<td class="number" data-label="figure">{figure}</td>'
        f'<td class="number" data-label="tolerance">{tolerance}</td>'
        f"<td>{'' if detail is None else markup.show_any(detail)}</td></tr>"
    )


def was_equal(check: Mapping[str, Any]) -> bool | None:
    """Only a plain `true` is a pass; what is neither true nor false was not checked."""
    passed = check.get("passed")
    return passed if isinstance(passed, bool) else None


def was_tied(check: Mapping[str, Any]) -> bool:
    """Whether it passed, but not with the same tokens everywhere."""
    return check.get("passed") is True and bool(check.get("ties"))


def was_limited(check: Mapping[str, Any]) -> bool:
    """Whether it passed up to what the runtime does otherwise by its own rules."""
    return check.get("passed") is True and bool(check.get("limits"))
