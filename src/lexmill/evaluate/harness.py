"""EleutherAI's lm-evaluation-harness runs lexmill's models: as an object for its Python interface, or on its command line.

python -m lexmill.evaluate.harness --model lexmill --model_args path=MODEL --tasks TASK
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lexmill.errors import DataError, MissingPackageError, ModelError
from lexmill.inference.language_model import LanguageModel, generation_config, load

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingPackageError("lm-eval", "to run EleutherAI's evaluation harness", "harness") from error

_GENERATED = 256  # tokens, where a task does not say


@register_model("lexmill")
class HarnessModel(TemplateLM):
    """A decoder as the harness asks it; its tokens, windows and truncations are those of the harness's own "hf" model.

    Args:
        path: a model directory, a run directory or an adapter.
        model: a model that is loaded already, instead.
        batch_size: rows computed at once; "auto" is 8.
        max_length: tokens of context, if less than the model's.
        base: of an adapter, if not the one that it names.

    Raises:
        ModelError: the model is no decoder.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: LanguageModel | None = None,
        batch_size: int | str | None = 8,
        max_length: int | None = None,
        base: str | None = None,
        **_: Any,  # what the harness gives every model: device, max_batch_size
    ) -> None:
        super().__init__()
        if model is None:
            if path is None:
                raise ModelError("There is no model to evaluate.", "Give path=MODEL.")
            model = load(path, base=base)
        if model.config.shape != "decoder":
            raise ModelError(f"The harness asks decoders; this model has the shape '{model.config.shape}'.")
        self.model, self.path = model, Path(path or model.path or "model")
        size = str(batch_size or 8)
        self.batch_size = int(size) if size.isdigit() else 8
        self.max_length = min(max_length or model.config.context, model.config.context)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        ids = self.model.tokenizer.ids
        found = ids.eos if ids.eos is not None else next(iter(ids.stop), ids.bos)
        if found is None:
            raise ModelError("This tokenizer has no token that begins or ends a text.")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.model.tokenizer.ids.bos
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids as transformers gives them; a text that begins with the BOS token gets no second one."""
        tokenizer = self.model.tokenizer
        bos = tokenizer.ids.bos
        begun = bos is not None and string.startswith(tokenizer.token_text(bos))
        if add_special_tokens is False or (add_special_tokens is None and begun):
            return tokenizer.encode_plain([string], special=True)[0]
        return tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) the continuation's log-probability, and whether it is greedy."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"A continuation has {longest:,} tokens, but the context holds {self.max_length:,}.",
                "The task does not suit this model.",
            )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # longest first: rows of like lengths together, and no memory that a later batch lacks
        order = sorted(
            range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2])
        )
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            rows = [(requests[index][1] + requests[index][2])[-(self.max_length + 1) :] for index in members]
            wanted = [len(requests[index][2]) for index in members]
            for index, answer in zip(members, self._continuations(rows, wanted)):
                found[index] = answer
                if requests[index][0] is not None:  # a window of a longer text is no request
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return found

    @torch.inference_mode()
    def _continuations(self, rows: Sequence[list[int]], wanted: Sequence[int]) -> list[tuple[float, bool]]:
        """The last `wanted` tokens of each row, given those before."""
        network: Any = self.model.network
        device = next(network.parameters()).device
        tokens = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for place, row in enumerate(rows):  # what fills a row stands behind it, where nothing looks
            tokens[place, : len(row) - 1] = torch.tensor(row[:-1])
        hidden = network.hidden(tokens.to(device))
        found = []
        for place, (row, count) in enumerate(zip(rows, wanted)):
            states = hidden[place, len(row) - 1 - count : len(row) - 1]
            scores = F.linear(states, network.head_weight).float().log_softmax(-1)
            targets = torch.tensor(row[len(row) - count :], device=device)
            picked = scores.gather(1, targets[:, None])
            found.append((float(picked.sum()), bool((scores.argmax(-1) == targets).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of which each predicts what the one before did not."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, cut):
                windows.append((None, list(context), list(continuation)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += logprob
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each context, until one of the task's texts; greedy unless the task samples."""
        found = []
        for request in requests:
            context, options = request.args
            most = int(options.get("max_gen_toks", options.get("max_new_tokens", _GENERATED)))
            until = options.get("until") or []
            ids = self.tok_encode(context)[-max(self.max_length - most, 1) :]
            sampling = {}
            if options.get("do_sample") or options.get("temperature"):
                names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
                sampling = {"temperature": 1.0} | {name: options[name] for name in names if name in options}
            steps = self.model.stream_ids(
                ids or [self.prefix_token_id],
                generation_config(
                    max_tokens=min(most, self.max_length - len(ids)),
                    stop=[until] if isinstance(until, str) else [text for text in until if text],
                    **sampling,
                ),
            )
            text = "".join(step.text for step in steps)
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it; without a generation prompt its last message stays open."""
        text = self.model.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, which is the only one."""
        return self.model.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of what the harness tokenizes."""
        return str(self.path.resolve()).replace("/", "__")


def main() -> None:
    """The harness's own command line, which then knows `--model lexmill`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
