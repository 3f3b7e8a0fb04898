"""transformers with a model directory as anyone would load it, in float32: what `verify` asks, a class a shape."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lexmill.errors import MissingPackageError
from lexmill.files import read_json
from lexmill.inference.sampling import log_softmax
from lexmill.model.directory import ModelDirectory


@contextlib.contextmanager
def open_transformers(directory: ModelDirectory) -> Iterator[Any]:
    """The model in transformers, quietly.

    Yields:
        `TransformersDecoder`, `TransformersEncoder` or `TransformersEncoderDecoder`, by the model's shape.

    Raises:
        MissingPackageError: transformers or torch is not installed.
    """
    for package in ("transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "to compare with transformers", "runtimes")
    with _quiet():
        yield _SHAPES[directory.config.shape](directory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _Transformers:
    """What every shape has: the tokenizer, and the class that config.json names."""

    def __init__(self, directory: ModelDirectory) -> None:
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        self._path = str(directory.path)
        values = read_json(directory.path / "config.json", "model configuration")
        self.architecture = str((values.get("architectures") or [""])[0])
        auto = getattr(transformers, self._auto_class())
        self._model: Any = auto.from_pretrained(self._path, local_files_only=True, dtype=torch.float32).eval()

    def _auto_class(self) -> str:
        raise NotImplementedError

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self._transformers.AutoTokenizer.from_pretrained(self._path, local_files_only=True)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text)

    def tokenize_plain(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are not recognised, and nothing around them."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(list(ids))

    def _row(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)])

    # What follows is for the two shapes that write.

    @property
    def _stops(self) -> list[int]:
        listed = self._model.generation_config.eos_token_id
        return listed if isinstance(listed, list) else [] if listed is None else [listed]

    def declared_ids(self) -> list[int]:
        """The ids to which the generation settings give a meaning."""
        config = self._model.generation_config
        found = [*self._stops, config.bos_token_id, config.pad_token_id]
        return [token for token in found if token is not None]

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation of `ids`, without the token that ended it."""
        return self._without_end(self._generate(ids, max_tokens))

    def ends_at(self, token: int, before: Sequence[int]) -> bool:
        """Whether generation ends when it comes to `token`: tried, by forcing it."""

        def only(_: Any, scores: Any) -> Any:
            forced = self._torch.full_like(scores, -1e9)
            forced[:, token] = 0
            return forced

        forcing = self._transformers.LogitsProcessorList([only])
        return len(self._generate(before, 2, logits_processor=forcing)) == 1

    def _without_end(self, found: list[int]) -> list[int]:
        return found[:-1] if found and found[-1] in self._stops else found

    def _generate(self, ids: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        prompt = self._row(ids)
        options = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": 1, **more}
        if self._model.generation_config.pad_token_id is None:
            options["pad_token_id"] = 0  # one prompt has no padding; this only stops a warning
        with self._torch.inference_mode():
            output = self._model.generate(prompt, attention_mask=self._torch.ones_like(prompt), **options)
        # an encoder–decoder's begins with its start token, a decoder's with the prompt
        return output[0, 1 if self._model.config.is_encoder_decoder else len(ids) :].tolist()


class TransformersDecoder(_Transformers):
    """The questions of `verify_checks.Runtime`."""

    def _auto_class(self) -> str:
        return "AutoModelForCausalLM"

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation."""
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
        """The log-probabilities of what follows each prompt: (prompts, vocabulary)."""
        with self._torch.inference_mode():
            rows = [self._model(self._row(ids)).logits[0, -1] for ids in prompts]
        return log_softmax(self._torch.stack(rows).float().numpy())


class TransformersEncoder(_Transformers):
    """Ids of pairs, what the heads say, and the hidden states below them."""

    def _auto_class(self) -> str:
        endings = {
            "ForPreTraining": "AutoModelForPreTraining",
            "ForMaskedLM": "AutoModelForMaskedLM",
            "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
            "ForSequenceClassification": "AutoModelForSequenceClassification",
            "ForQuestionAnswering": "AutoModelForQuestionAnswering",
        }
        found = [auto for ending, auto in endings.items() if self.architecture.endswith(ending)]
        return found[0] if found else "AutoModel"

    def pair(self, first: str, second: str) -> tuple[list[int], list[int] | None]:
        """The ids of two texts, and the segment of each; None where the tokenizer gives the model no segments."""
        both = self._tokenizer(first, second)
        return both["input_ids"], both.get("token_type_ids")

    def masked_logits(self, ids: Sequence[int]) -> np.ndarray | None:
        """Of the masked-language-modelling head: (len(ids), vocabulary); None without one."""
        out = self._run(self._model, ids)
        pairs_only = self.architecture.endswith("ForNextSentencePrediction")
        found = out.get("prediction_logits", None if pairs_only else out.get("logits"))
        return None if found is None else found[0].float().numpy()

    def pair_logits(self, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray | None:
        """Of the next-sentence head, (2,); None without one."""
        out = self._run(self._model, ids, token_type_ids=self._row(segments))
        pairs_only = self.architecture.endswith("ForNextSentencePrediction")
        found = out.get("seq_relationship_logits", out.get("logits") if pairs_only else None)
        return None if found is None else found[0].float().numpy()

    def task_logits(self, ids: Sequence[int], segments: Sequence[int] | None) -> np.ndarray | None:
        """Of the head that tells labels apart, (labels,), or that finds answers, (2, len(ids)); None without one."""
        out = self._run(
            self._model, ids, **({} if segments is None else {"token_type_ids": self._row(segments)})
        )
        if "start_logits" in out:
            return np.stack([out[name][0].float().numpy() for name in ("start_logits", "end_logits")])
        found = out.get("logits") if self.architecture.endswith("ForSequenceClassification") else None
        return None if found is None else found[0].float().numpy()

    def mean_hidden(self, ids: Sequence[int]) -> np.ndarray:
        """The mean of the last hidden states of a text: (width,)."""
        return self._run(self._model.base_model, ids).last_hidden_state[0].mean(0).float().numpy()

    def mean_hidden_of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The same of several texts, padded to one length as the tokenizer does: (texts, width)."""
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        with self._torch.inference_mode():
            hidden = self._model.base_model(**batch).last_hidden_state.float()
        real = batch["attention_mask"][..., None]
        return ((hidden * real).sum(1) / real.sum(1)).numpy()

    def _run(self, model: Any, ids: Sequence[int], **more: Any) -> Any:
        with self._torch.inference_mode():
            return model(self._row(ids), **more)


class TransformersEncoderDecoder(_Transformers):
    """Logits behind what was written so far, and what `generate` writes."""

    def _auto_class(self) -> str:
        return "AutoModelForSeq2SeqLM"

    def logits(self, source: Sequence[int], written: Sequence[int]) -> np.ndarray:
        """What follows each of the ids `written`: (len(written), vocabulary)."""
        with self._torch.inference_mode():
            out = self._model(input_ids=self._row(source), decoder_input_ids=self._row(written))
        return out.logits[0].float().numpy()

    def beams(self, source: Sequence[int], beams: int, max_tokens: int) -> list[int]:
        """The best continuation of a beam search, with the token that ended it, without padding."""
        options = {"num_beams": beams, "early_stopping": False, "length_penalty": 1.0}
        found = self._generate(source, max_tokens, **options)
        ends = [at for at, token in enumerate(found) if token in self._stops]
        return found[: ends[0] + 1] if ends else found


_SHAPES = {
    "decoder": TransformersDecoder,
    "encoder": TransformersEncoder,
    "encoder_decoder": TransformersEncoderDecoder,
}
