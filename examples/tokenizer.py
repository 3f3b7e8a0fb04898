"""Train a tokenizer on a text file, and look at what it does.

python examples/tokenizer.py corpora/austen/Persuasion.txt
"""

import argparse
from pathlib import Path

import lexmill
from lexmill.tokenizer.training import TokenizerConfig, bytes_per_token

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path)
parser.add_argument("--vocabulary", type=int, default=1024)
arguments = parser.parse_args()

text = arguments.text.read_text("utf-8")
held_out = text[-len(text) // 10 :]
tokenizer = lexmill.train_tokenizer(
    [text[: -len(held_out)]], TokenizerConfig(vocab_size=arguments.vocabulary)
)

print(
    f"{tokenizer.vocab_size:,} tokens; {bytes_per_token(tokenizer, [held_out]):.2f} bytes a token on held-out text"
)
for example in ("It is a truth universally acknowledged", "naïve 你好 🙂", "<|im_end|>"):
    ids = tokenizer.encode(example)
    print(f"\n{example!r}: {len(ids)} tokens")
    print("  " + " ".join(f"{token}={tokenizer.token_text(token)!r}" for token in ids))
    assert tokenizer.decode(ids) == example  # every text comes back
