"""What a fine-tuned model leaves open is chosen by its task's own score on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from lexmill.data.labelled import Question, Row
from lexmill.evaluate.qa import find_threshold
from lexmill.inference.language_model import LanguageModel
from lexmill.tokenizer.tokenizer import Tokenizer


def tune(
    task: str, network: Any, tokenizer: Tokenizer, fitted: dict[str, Any], rows: Sequence[Row]
) -> dict[str, Any]:
    """Of an encoder that answers questions, when it says that there is no answer; of other tasks nothing.

    Args:
        fitted: what the lesson fitted, for `lexmill.json`.
        rows: held out.

    Returns:
        `fitted`, with what was chosen.
    """
    settings = fitted.get("calibration") or {}
    if task != "qa" or not network.config.span or settings.get("null_threshold") is None:
        return fitted
    questions = [cast(Question, row) for row in rows]
    if all(one.answers for one in questions):  # nothing to learn from about silence
        return fitted
    network.eval()
    given = LanguageModel(network, tokenizer, None, fitted).answers(
        [(one.question, one.context) for one in questions]
    )
    threshold = find_threshold(given, questions)
    chosen = round(threshold, 5) if math.isfinite(threshold) else None
    return {**fitted, "calibration": {**settings, "null_threshold": chosen, "rows": len(questions)}}
