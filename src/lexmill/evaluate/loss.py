"""The mean loss of a decoder's targets."""

from __future__ import annotations

from collections.abc import Sequence

from lexmill.errors import DataError
from lexmill.inference.language_model import LanguageModel
from lexmill.train.batches import fixed_batches
from lexmill.train.causal import causal_loss
from lexmill.train.examples import Example
from lexmill.train.objective import Measure, measure

_ROW = 1024  # tokens of a row, unless an example is longer


def mean_loss(model: LanguageModel, examples: Sequence[Example], rows: int = 16) -> Measure:
    """Losses and accuracies of all targets, computed `rows` rows at once.

    Raises:
        DataError: there are no targets.
    """
    if not examples:
        raise DataError("There are no targets to measure on.")
    pad = model.tokenizer.ids.pad or 0
    # work and memory of attention grow with the square of a row's length
    length = max(min(model.config.context, _ROW), max(len(example.tokens) for example in examples))
    batches = fixed_batches(examples, rows=rows, length=length, pad_id=pad)
    return measure(model.network, causal_loss, batches)
