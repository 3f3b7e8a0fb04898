"""GGUF files as others make them: written with the `gguf` package, so that nothing of lexmill's own writers is in them."""

import functools

import numpy as np

from lexmill.runtimes.verify_cases import TEXTS

HARD_TEXTS = (
    *TEXTS,
    "don't DON'T we'LL I'D it'S they'Re he'Ve",
    "1234567890 12 345.678,90 $1,234.50 +3-4*5/6=7^8 <a|b> `code` ~x~",
    "word1word2 2nd 3rd x2 2x A1B2C3 ABCdef abcDEF HTTPServer",
    "   leading\n\n  indented\n\tboth\t\n   ",
    "a  b   c    d\r\n\r\ne\n\n\nf",
    "(parens) [brackets] {braces} «guillemets» “quotes” ‘single’ …— – ",
)


@functools.cache
def wide_bpe(size=1400, hidden=60):
    """Tokens and merges of a byte-level BPE that was trained without any cutting into words.

    Its merges run over every border that a pre-tokenizer could set, so that each border shows in the
    ids. The last `hidden` tokens have lost their merges: they are found as whole words, or not at all.
    """
    import json

    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        max_token_length=6,
        special_tokens=["<|begin|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([text for text in HARD_TEXTS for _ in range(2)], trainer)
    values = json.loads(fast.to_str())["model"]
    tokens = sorted(values["vocab"], key=values["vocab"].get)
    lost = set(tokens[-hidden:])
    merges = [pair for pair in values["merges"] if "".join(pair) not in lost]
    return tokens, [" ".join(pair) for pair in merges]


def write_llama(path, tokenizer, tokens, *, seed=0, extra=None, dtype="F32", arch="llama", context=256):
    """A one-layer model with random weights around a tokenizer.

    Args:
        tokenizer: a function that adds the tokenizer's keys to a `gguf.GGUFWriter`.
        extra: another function that adds keys.
    """
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("a sample")
    writer.add_author("somebody")
    writer.add_license("mit")
    writer.add_context_length(context)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    tokenizer(writer)
    if extra:
        extra(writer)
    shapes = {
        "token_embd.weight": (len(tokens), 32),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
        "output_norm.weight": (32,),
    }
    kind = gguf.GGMLQuantizationType[dtype]
    for name, shape in shapes.items():
        norm = len(shape) == 1
        weight = (1 + 0.1 * rng.standard_normal(shape)) if norm else 0.3 * rng.standard_normal(shape)
        weight = weight.astype(np.float32)
        if norm or dtype == "F32":
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_bpe(pre, tokens, merges, **flags):
    """The keys of a byte-level BPE."""

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for name, value in flags.items():
            getattr(writer, name)(value)

    return add


@functools.cache
def sentencepiece_pieces(size=700):
    """Pieces, scores and types of a SentencePiece BPE with bytes, as Llama 2 has it."""
    import json

    import tokenizers
    from tokenizers import models, normalizers, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, max_token_length=8, show_progress=False)
    texts = [text for text in HARD_TEXTS if text.isprintable()]
    fast.train_from_iterator([*texts, *texts[::2]], trainer)
    values = json.loads(fast.to_str())["model"]
    made = list(dict.fromkeys("".join(pair) for pair in values["merges"]))
    letters = [text for text in values["vocab"] if len(text) == 1]
    special = ["<unk>", "<s>", "</s>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*special, *in_bytes, *made, *letters, "<|tool|>"]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(made))] + [-1e4] * len(letters) + [-1000.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(made) + len(letters)) + [4]
    return pieces, scores, types


def sentencepiece_bpe(pieces, scores, types, **flags):
    """The keys of a SentencePiece BPE."""

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for name, value in flags.items():
            getattr(writer, name)(value)

    return add
