"""From a text file to a model that writes, with the stages as plain functions.

python examples/pretrain_from_text.py corpora/austen/Persuasion.txt my-model --steps 200

The same in a recipe would be cached and resumable: see recipes/quickstart.toml.
"""

import argparse
from pathlib import Path

import lexmill
from lexmill.data.documents import read_documents
from lexmill.data.prepare import PrepareConfig, SourceConfig
from lexmill.pretrain.stage import PretrainConfig, ShapeConfig
from lexmill.tokenizer.training import TokenizerConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=2)
arguments = parser.parse_args()

# raw text to documents: one for each chapter, lines joined to paragraphs, a tenth held out
documents = arguments.out / "documents"
source = SourceConfig(path=str(arguments.text.resolve()), split="^Chapter [0-9]+$", unwrap=True)
lexmill.prepare(PrepareConfig(sources=(source,), validation_fraction=0.1), documents, Path("."))

# documents to a tokenizer
texts = (document.text or "" for document in read_documents(documents / "train.parquet"))
tokenizer = lexmill.train_tokenizer(texts, TokenizerConfig(vocab_size=512))

# documents and tokenizer to a model
shape = ShapeConfig(width=arguments.width, layers=arguments.layers, heads=2, context=128)
config = PretrainConfig(
    model=shape, steps=arguments.steps, rows=8, validate_every=max(1, arguments.steps // 2)
)
directory, result = lexmill.pretrain(config, documents, tokenizer, arguments.out / "pretrain")

print(f"{directory.config.parameters:,} parameters, {result.tokens:,} tokens, loss {result.loss:.3f}")
print(lexmill.load(directory.path).generate("She was", max_tokens=40, temperature=0.8, seed=1))
