"""Why a GGUF file gives other answers than its model: what `verify` found, as a cause in words.

`verify` asks a runtime and sees that answers differ. This looks into the file instead, and tries the
mistakes that are made in practice one by one: symptom, then sentence. It only runs once a check has failed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from lexmill.errors import FormatError, LexmillError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_rope import is_neutral
from lexmill.model.gguf_shapes import architecture, shape_metadata
from lexmill.runtimes.diagnosis_tokenizer import tokenizer_causes
from lexmill.runtimes.diagnosis_weights import weight_causes
from lexmill.runtimes.gguf_kept import same_value
from lexmill.runtimes.verify_report import Diagnosis

# What a setting does, and what llama.cpp takes where a file leaves it out (src/llama-model.cpp); None where
# it then refuses the file.
_SETTINGS: dict[str, tuple[str, object]] = {
    "rope.freq_base": ("the base of the rotary positions (RoPE theta)", 10000.0),
    "rope.scaling.type": ("how rotary positions are scaled", "linear"),
    "rope.scaling.factor": ("by how much rotary positions are scaled", 1.0),
    "rope.scaling.original_context_length": ("the context before rotary positions were scaled", ()),
    "rope.dimension_count": ("the part of a head that rotary positions turn", ()),
    "attention.layer_norm_rms_epsilon": ("the epsilon of the norms", None),
    "attention.layer_norm_epsilon": ("the epsilon of the norms", None),
    "context_length": ("the context length", None),
    "attention.head_count": ("the number of heads", None),
    "attention.head_count_kv": ("the number of key and value heads", ()),
    "attention.key_length": ("the width of a head", ()),
    "attention.value_length": ("the width of a head", ()),
    "attention.causal": ("whether a token sees only those before it", True),
    "pooling_type": ("the pooling (0 none, 1 mean, 2 first token, 3 last token)", 0),
    "block_count": ("the number of layers", None),
    "embedding_length": ("the width of the model", None),
    "feed_forward_length": ("the width of the MLP", None),
    "vocab_size": ("the size of the vocabulary", ()),
}
_MOST = 8  # causes that are told of one file
_COMPUTED = {"runs", "weights", "logits", "rounding", "greedy", "embeddings"}
_IDS = {"runs", "tokens", "injection", "round trip"}
_ENDS = {"runs", "stop tokens", "greedy"}
# The checks that each kind of cause can make fail.
_EXPLAINS = {
    "setting": _COMPUTED,
    "weights": _COMPUTED,
    "vocabulary": _IDS | _ENDS,
    "ids": _IDS,
    "ends": _ENDS,
    "template": {"chat template", "greedy"},
}


def diagnose_file(
    runtime: str, path: Path, model: ModelDirectory, failed: Collection[str]
) -> list[Diagnosis]:
    """The likely causes, likeliest first; at least one.

    Args:
        runtime: the name to put on them.
        path: the GGUF file whose answers differ.
        model: what it should hold.
        failed: the names of the checks that failed.
    """
    try:
        with GGUFFile.open(path) as file:
            found = list(_causes(file, model))
    except FormatError as error:
        return [
            Diagnosis(runtime, f"The file is damaged, cut off, or of a type not known here: {error.message}")
        ]
    except LexmillError as error:
        return [Diagnosis(runtime, f"The file cannot be read: {error.message}")]
    # A cause explains some checks; one that explains none of what failed did no harm that anybody saw.
    explaining = [sentence for kind, sentence in found if _EXPLAINS[kind] & set(failed)]
    unexplained = set(failed).difference(*(_EXPLAINS[kind] for kind, _ in found))
    explaining = explaining[:_MOST]
    if unexplained:
        rounding = _ROUNDING if unexplained & _COMPUTED else ""
        explaining.append(_NOTHING_FOUND.format(checks=", ".join(sorted(unexplained)), rounding=rounding))
    return [Diagnosis(runtime, sentence) for sentence in explaining]


_NOTHING_FOUND = (
    "Nothing in the file explains what was found in {checks}: there the runtime itself does otherwise than the file "
    "says{rounding}."
)
_ROUNDING = ", or its rounding adds up to more than is allowed for"


def _causes(file: GGUFFile, model: ModelDirectory) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of everything in the file that is not the model's."""
    found, meant = file.metadata.get("general.architecture"), architecture(model.config)
    if found != meant:
        yield "setting", f"The file is of another architecture: {found}, not {meant}."
        return
    for sentence in _setting_causes(file, model):
        yield "setting", sentence
    for sentence in weight_causes(file, model):
        yield "weights", sentence
    if model.has_tokenizer:
        yield from tokenizer_causes(file, model)


def _setting_causes(file: GGUFFile, model: ModelDirectory) -> Iterator[str]:
    family = architecture(model.config)
    expected = shape_metadata(model.config, model.pooling)
    if model.has_tokenizer:
        del expected[f"{family}.vocab_size"]  # the tokens and the rows of the embedding say more
    for key, value in file.metadata.items():
        if key.startswith(f"{family}.rope.scaling.") and key not in expected and not is_neutral(key, value):
            yield f"The file scales rotary positions otherwise than the model: {key} is {_plain(value)}."
    for key, value in expected.items():
        meaning, absent = _SETTINGS.get(key.removeprefix(f"{family}."), ("a setting", ()))
        if key in file.metadata:
            if not same_value(value, file.metadata[key]):
                yield (
                    f"{meaning[0].upper()}{meaning[1:]} is wrong: {key} is {_plain(file.metadata[key])}, "
                    f"the model has {_plain(value.value)}."
                )
        elif absent is None:
            yield f"The file does not say {meaning}: {key} is missing, and llama.cpp needs it."
        elif absent != () and absent != value.value:
            yield (
                f"The file does not say {meaning}: {key} is missing, so llama.cpp takes {absent}; "
                f"the model has {value.value}."
            )


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)[:60]
