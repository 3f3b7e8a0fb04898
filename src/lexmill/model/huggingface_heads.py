"""The heads of tasks in Hugging Face's `config.json`: names of labels, and which classes are known. Free of torch."""

from __future__ import annotations

from typing import Any

from lexmill.errors import ModelError
from lexmill.model.config import ModelConfig
from lexmill.model.huggingface_values import Values

_MOST_LABELS = 100_000


def read_labels(reader: Values) -> tuple[str, ...]:
    """The names of labels by their numbers, as `id2label` says; LABEL_0, LABEL_1 … where it says nothing.

    Raises:
        ModelError: names that are none, or numbers with gaps.
    """
    values = reader.values
    found = values.get("id2label")
    if not found:
        count = reader.get("num_labels", int, 2)
        if not 1 <= count <= _MOST_LABELS:
            raise ModelError(f"{reader.where}: 'num_labels' is {count:,}.")
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(found, dict) or len(found) > _MOST_LABELS:
        raise ModelError(f"{reader.where}: 'id2label' should be an object of names by numbers.")
    by_number = {str(number): str(label) for number, label in found.items()}
    names = [by_number.get(str(index)) for index in range(len(found))]
    labels = tuple(name for name in names if name is not None)
    if len(labels) != len(names):
        raise ModelError(f"{reader.where}: the numbers in 'id2label' are not 0, 1, 2 …, one for each label.")
    return labels


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """`id2label` and `label2id`, where there are labels."""
    if not config.labels:
        return {}
    return {
        "id2label": {str(index): label for index, label in enumerate(config.labels)},
        "label2id": {label: index for index, label in enumerate(config.labels)},
        "problem_type": "single_label_classification",
    }


def refuse_other_heads(reader: Values, headed: bool, known: tuple[str, ...]) -> None:
    """A head that looks like one of the known ones, but is used otherwise, is an error.

    Raises:
        ModelError: tags for tokens, several choices, several labels at once, a number in place of a label.
    """
    if not headed:
        return
    architectures = [str(name)[:80] for name in reader.values.get("architectures") or []]
    others = [name for name in architectures if name not in known]
    if others:
        raise ModelError(
            f"{reader.where}: the head of '{others[0]}' is not supported.",
            f"Supported are {' and '.join(known)}.",
        )
    kind = reader.values.get("problem_type")
    if kind not in (None, "single_label_classification"):
        raise ModelError(f"{reader.where}: heads of the kind '{str(kind)[:60]}' are not supported.")
