"""The pretraining stage: documents and a tokenizer in, a model directory out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from lexmill.errors import ConfigError
from lexmill.files import write_json
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.pretrain.lessons import LESSONS, OBJECTIVE_OF, name_documents
from lexmill.pretrain.masked import MaskingConfig
from lexmill.pretrain.shape import ShapeConfig
from lexmill.pretrain.spans import SpanConfig
from lexmill.progress import SILENT, Progress
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.batches import Loader, fixed_batches
from lexmill.train.config import TrainConfig
from lexmill.train.loop import Hooks, TrainResult, train
from lexmill.train.metrics import write_samples
from lexmill.train.objective import measure
from lexmill.train.processes import Processes

# (model, tokenizer, prompt) -> what the model makes of the prompt: its continuation, or what fills its gap
Sampler = Callable[[nn.Module, Tokenizer, str], str]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """The `[pretrain]` table of a recipe."""

    model: ShapeConfig = field(default_factory=ShapeConfig)
    objective: Literal["causal", "masked", "span_corruption"] | None = None  # the shape's own when not given
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    spans: SpanConfig = field(default_factory=SpanConfig)
    row_length: int | None = None  # tokens in a training row; the model's context when not given
    prompts: tuple[str, ...] = ()  # for samples as training goes on
    validation_tokens: int = 32768  # at most so many in each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = OBJECTIVE_OF[self.model.shape]
        if self.objective not in (None, fitting):
            fits = [shape for shape, objective in OBJECTIVE_OF.items() if objective == self.objective]
            raise ConfigError(
                f"The objective '{self.objective}' does not fit the family '{self.model.family}', which is "
                f"of the shape '{self.model.shape}'.",
                f"That shape learns by '{fitting}'; '{self.objective}' fits the shape '{fits[0]}'.",
            )
        self.shape(512)  # a shape that cannot be is refused now, not after preparing data
        if self.row_length is not None and not 4 <= self.row_length <= self.model.context:
            raise ConfigError(f"'row_length' must lie between 4 and the context ({self.model.context}).")

    def shape(self, vocab_size: int) -> ModelConfig:
        """The model, with the heads that the objective needs."""
        if self.model.shape != "encoder":
            return self.model.with_vocabulary(vocab_size)
        pairs = self.model.family == "bert" and self.masking.next_sentence
        dense = self.model.family == "bert"  # BERT's head has a bias in its dense layer, ModernBERT's none
        return self.model.with_vocabulary(vocab_size, mlm=True, mlm_bias=dense, pooler=pairs, nsp=pairs)


def pretrain(
    config: PretrainConfig,
    documents: Path,
    tokenizer: Tokenizer,
    out: Path,
    *,
    sample: Sampler | None = None,
    lineage: dict | None = None,
    progress: Progress = SILENT,
) -> tuple[ModelDirectory, TrainResult]:
    """Train a model of any shape from nothing and write `out/model`.

    `out` also receives token shards, `metrics.jsonl`, `samples.jsonl` and, while it lasts,
    checkpoints from which the same call goes on.

    Args:
        documents: the folder that `prepare` wrote.
        sample: what the model makes of a prompt; called for each of `config.prompts` as training goes on.

    Raises:
        DataError: no text.
        ModelError: a tokenizer that does not fit the objective.
        TrainingError: training diverged.
    """
    processes = Processes.join(config.device, deterministic=config.deterministic)
    if not processes.first:
        progress = SILENT
    shape = config.shape(tokenizer.vocab_size)
    objective = OBJECTIVE_OF[shape.shape]
    with processes.first_alone():
        lesson = LESSONS[objective](config, shape, documents, tokenizer, out / "tokens", progress)
    rows = {"rows": config.rows, "length": lesson.length, "decoder_length": lesson.decoder_length}
    model = build_model(shape)
    model.initialise(config.seed)
    progress.say(
        f"  {shape.parameters:,} parameters ({shape.family} shape: {shape.layers + shape.decoder_layers} layers, "
        f"width {shape.width}), {lesson.training_tokens:,} training tokens, objective {objective}"
    )
    most = max(1, config.validation_tokens // (config.rows * (lesson.length + lesson.decoder_length)))
    validation = fixed_batches(lesson.validation, pad_id=lesson.pad, **rows)[:most]
    on_device = [batch.to(processes.device) for batch in validation]

    def validate(model: nn.Module) -> dict[str, float]:
        return measure(model, lesson.loss, on_device).figures("validation")

    def show_samples(model: nn.Module, step: int) -> None:
        if sample is None:
            return
        said = [(prompt, sample(model, tokenizer, prompt)) for prompt in config.prompts]
        if processes.first:
            write_samples(out / "samples.jsonl", step, said)
        for prompt, text in said:
            progress.say(f"    {prompt}|{' '.join(text.split())[:90]}")

    result = train(
        model,
        lesson.loss,
        Loader(lesson.examples, pad_id=lesson.pad, seed=config.seed, **rows),
        config,
        out,
        label="pretraining",
        hooks=Hooks(
            validate=validate if validation else None,
            sample=show_samples if sample else None,
            name_documents=partial(name_documents, documents),
        ),
        progress=progress,
        processes=processes,
    )
    history = {
        "stage": "pretrain",
        "objective": objective,
        "steps": result.steps,
        "tokens": result.tokens,
        "precision": result.precision,
        "tokenizer_sha256": tokenizer.sha256,
        **lesson.facts,
    }
    weights = model.weights()
    with processes.first_alone():
        if processes.first:
            facts = {**(lineage or {}), "history": [history]}
            write_model_directory(out / "model", shape, weights, tokenizer, facts)
            write_json(out / "result.json", {**vars(result), "parameters": shape.parameters})
    return ModelDirectory.open(out / "model"), result
