"""A small encoder–decoder that learns to translate from nothing but pairs of sentences.

python examples/translate_from_scratch.py train.{en,de}.gz test.{en,de}.gz my-translator --minutes 5

The rows may have any form that "lexmill finetune --task translate" reads.
"""

import argparse
from pathlib import Path

import lexmill
from lexmill.data.forms import read_rows
from lexmill.data.labelled import TextPair
from lexmill.evaluate.scores import ScoreConfig
from lexmill.evaluate.task import score_task
from lexmill.finetune.config import FinetuneConfig
from lexmill.model.build import build_model
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.pretrain.shape import ShapeConfig
from lexmill.recipe.tuned import finetune_and_score
from lexmill.tokenizer.training import TokenizerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("train", type=Path)
parser.add_argument("test", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--minutes", type=float, default=5)
parser.add_argument("--vocabulary", type=int, default=4000, help="of both languages together")
parser.add_argument("--width", type=int, default=192)
parser.add_argument("--limit", type=int, default=None, help="test rows at most")
arguments = parser.parse_args()

# one vocabulary for both languages
rows = [row for row in read_rows(arguments.train, kind=TextPair) if isinstance(row, TextPair)]
texts = [text for row in rows for text in (row.source, *row.targets)]
options = TokenizerConfig(kind="unigram", vocab_size=arguments.vocabulary, sentinels=8)
tokenizer = lexmill.train_tokenizer(texts, options)

# a model that knows nothing yet
shape = ShapeConfig(family="t5", width=arguments.width, layers=3, heads=4, context=128, dropout=0.1)
model = build_model(shape.with_vocabulary(tokenizer.vocab_size))
model.initialise(0)
fresh = arguments.out / "fresh"
write_model_directory(fresh, model.config, model.weights(), tokenizer)

# no instruction: this model can do nothing else
config = FinetuneConfig(
    task="translate",
    minutes=arguments.minutes,
    instruction="{source}",
    rows=16,
    row_length=128,
    validate_every=100,
    stop_metric="bleu",
)
made, result, scores = finetune_and_score(
    config, ModelDirectory.open(fresh), arguments.train, arguments.out / "trained"
)
print(f"{result.steps:,} steps; validation before and after: {scores['translate']}")

translator = lexmill.load(made.path)
for beams in (1, 4):
    asked = ScoreConfig(beams=beams, max_tokens=64, limit=arguments.limit)
    scores = score_task("translate", translator, arguments.test, asked)
    print(f"{beams} beams: {scores.metrics} {scores.details['bleu_signature']}")
for example in scores.examples[:3]:
    print(f"{example['question']}\n  {example['given']}")
