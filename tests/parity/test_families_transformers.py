"""Every family against transformers, both ways: their directories open here, ours open there, with the same numbers."""

import json

import numpy as np
import pytest
import torch
from conftest import randomise

import lexmill
from lexmill.model.build import build_loaded, build_model
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.names import weight_names, weight_shapes

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
BERT = dict(SMALL, max_position_embeddings=64)
MODERN = dict(
    SMALL,
    num_hidden_layers=5,
    local_attention=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)
LABELS = {0: "好", 1: "bad", 2: "neither"}
T5 = dict(
    vocab_size=99,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    decoder_start_token_id=0,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)
CAUSAL = dict(SMALL, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, bos_token_id=None)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", CAUSAL),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", CAUSAL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(CAUSAL, head_dim=8)),
    "bert for pretraining": ("BertForPreTraining", "BertConfig", BERT),
    "bert masked": ("BertForMaskedLM", "BertConfig", dict(BERT, hidden_act="gelu_new")),
    "bert masked, untied": ("BertForMaskedLM", "BertConfig", dict(BERT, tie_word_embeddings=False)),
    "bert pairs": ("BertForNextSentencePrediction", "BertConfig", BERT),
    "bert": ("BertModel", "BertConfig", BERT),
    "bert labels": ("BertForSequenceClassification", "BertConfig", dict(BERT, id2label=LABELS)),
    "bert two labels": ("BertForSequenceClassification", "BertConfig", dict(BERT, hidden_act="relu")),
    "bert span": ("BertForQuestionAnswering", "BertConfig", BERT),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "modernbert, biases": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        dict(MODERN, norm_bias=True, mlp_bias=True, classifier_bias=True),
    ),
    "modernbert, all global": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        dict(MODERN, layer_types=["full_attention"] * 5),
    ),
    "modernbert labels": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        dict(MODERN, id2label=LABELS, classifier_bias=True, norm_bias=True),
    ),
    "modernbert labels, mean": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        dict(MODERN, id2label=LABELS, classifier_pooling="mean"),
    ),
    "modernbert span": ("ModernBertForQuestionAnswering", "ModernBertConfig", MODERN),
    "modernbert without head": ("ModernBertModel", "ModernBertConfig", MODERN),
    "t5 1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "t5 1.0": ("T5ForConditionalGeneration", "T5Config", T5),
}
TOKENS = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))
WRITTEN = torch.randint(3, 99, (2, 30), generator=torch.Generator().manual_seed(2))
SEGMENTS = (torch.arange(40)[None] > 22).long().expand(2, -1)


def theirs(case, untied=False, **changes):
    name, config, values = CASES[case]
    values = {**values, **changes}
    model = getattr(transformers, name)(getattr(transformers, config)(**values, attn_implementation="eager"))
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return randomise(model).eval()


def their_numbers(model):
    name = type(model).__name__
    if name.endswith("QuestionAnswering"):
        out = model(TOKENS, token_type_ids=SEGMENTS) if name.startswith("Bert") else model(TOKENS)
        return [torch.stack([out.start_logits, out.end_logits], -1)]
    if name.startswith("T5"):
        return [model(input_ids=TOKENS, decoder_input_ids=WRITTEN).logits]
    if name.startswith("Bert"):
        out = model(TOKENS, token_type_ids=SEGMENTS)
        if name == "BertForPreTraining":
            return [out.prediction_logits, out.seq_relationship_logits]
        return [out.last_hidden_state, out.pooler_output] if name == "BertModel" else [out.logits]
    out = model(TOKENS)
    return [out.last_hidden_state] if name == "ModernBertModel" else [out.logits]


def our_numbers(model):
    config = model.config
    if config.shape == "encoder_decoder":
        return [model(TOKENS, WRITTEN)]
    if config.shape == "decoder":
        return [model(TOKENS)]
    hidden = model.hidden(TOKENS, segments=SEGMENTS if config.segments else None)
    if config.labels:
        return [model.label_logits(hidden[:, 0] if config.label_pooling == "cls" else hidden.mean(1))]
    if config.span:
        return [model.span_logits(hidden)]
    found = [model.masked_logits(hidden)] if config.mlm else []
    if config.nsp:
        found.append(model.pair_logits(hidden[:, 0]))
    elif config.pooler:
        found.append(model.pooled(hidden[:, 0]))
    return found if config.mlm or config.nsp else [hidden, *found]


@pytest.mark.parametrize("case", CASES)
def test_their_directories_open_here_with_equal_logits_and_gradients(case, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    model = build_loaded(ModelDirectory.open(tmp_path).config, ModelDirectory.open(tmp_path).weights()).eval()
    expected, found = their_numbers(reference), our_numbers(model)
    assert [one.shape for one in found] == [one.shape for one in expected]
    for mine, other in zip(found, expected):
        assert (mine - other).abs().max() < 1e-5
    # the same random direction pulls at both: gradients must agree weight by weight
    for numbers in (found, expected):
        generator = torch.Generator().manual_seed(7)
        sum((one * torch.randn(one.shape, generator=generator)).sum() / 100 for one in numbers).backward()
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    own = dict(model.named_parameters())
    for name in weight_names(model.config):
        whole = gradients.get(name.huggingface)
        if whole is None:
            continue
        index, of = name.part
        part = whole.chunk(of)[index]
        assert (own[name.own].grad - part).abs().max() < 1e-5 * max(1.0, float(part.abs().max())), name.own


@pytest.mark.parametrize("case", CASES)
def test_our_directories_open_there_with_equal_logits(case, tmp_path, any_tokenizer):
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    opened = ModelDirectory.open(tmp_path / "theirs")
    write_model_directory(tmp_path / "ours", opened.config, opened.weights(), any_tokenizer)
    again, told = type(reference).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        for mine, other in zip(their_numbers(again.eval()), their_numbers(reference)):
            assert torch.equal(mine, other)
    assert ModelDirectory.open(tmp_path / "ours").config == opened.config


@pytest.mark.parametrize("case", CASES)
def test_weight_tables_are_total_and_one_to_one(case, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    config = ModelDirectory.open(tmp_path).config
    model, names = build_model(config), weight_names(config)
    own = dict(model.named_parameters())
    assert {name.own for name in names} == set(own)
    assert len({name.own for name in names}) == len(names)
    assert len({(name.huggingface, name.part) for name in names}) == len(names)
    held = [name.gguf for name in names if name.gguf and name.part[0] == 0]
    assert len(set(held)) == len(held)
    assert weight_shapes(config) == {name: tuple(weight.shape) for name, weight in own.items()}
    assert config.parameters == sum(weight.numel() for weight in own.values())


def test_t5_with_a_projection_of_its_own(tmp_path):
    reference = theirs("t5 1.1", untied=True)
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": False}))
    opened = ModelDirectory.open(tmp_path)
    assert not opened.config.tied and not opened.config.scale_output
    model = build_loaded(opened.config, opened.weights()).eval()
    assert (model(TOKENS, WRITTEN) - their_numbers(reference)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["llama", "bert", "modernbert", "t5 1.1"])
def test_hidden_states_and_attention_equal_transformers(case, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    inside = lexmill.load(tmp_path)
    ids = TOKENS[0].tolist()
    from lexmill.inference.torch_backend import look_inside

    asked = dict(output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        if case == "t5 1.1":
            found = look_inside(inside.network, ids, WRITTEN[0].tolist())
            out = reference(input_ids=TOKENS[:1], decoder_input_ids=WRITTEN[:1], **asked)
            pairs = [
                ("hidden", out.encoder_hidden_states),
                ("attention", out.encoder_attentions),
                ("decoder_attention", out.decoder_attentions),
                ("cross", out.cross_attentions),
            ]
        else:
            found = look_inside(inside.network, ids)
            out = reference(TOKENS[:1], **asked)
            pairs = [("hidden", out.hidden_states), ("attention", out.attentions)]
    for name, expected in pairs:
        stacked = torch.cat([one.float() for one in expected]).numpy()
        assert found[name].shape == stacked.shape, name
        assert np.abs(found[name] - stacked).max() < 1e-5, name


@pytest.mark.parametrize("case", ["t5 1.1", "t5 1.0"])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_generation_equals_transformers(case, beams, tmp_path, any_tokenizer):
    # transformers sizes its cache by the encoder's layers: both sides get as many
    reference = theirs(case, num_decoder_layers=2)
    reference.save_pretrained(tmp_path)
    any_tokenizer.save(tmp_path)
    model, stop = lexmill.load(tmp_path), list(any_tokenizer.ids.stop)
    for row in range(2):
        ids = TOKENS[row].tolist()
        with torch.no_grad():
            expected = reference.generate(
                TOKENS[row : row + 1],
                max_new_tokens=24,
                num_beams=beams,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=0,
                decoder_start_token_id=0,
            )[0, 1:].tolist()
        expected = [token for token in expected if token not in (*stop, 0)]
        if beams == 1:
            assert model.generate_ids(ids, max_tokens=24) == expected
        best = model.beam_ids(ids, beams=beams, max_tokens=24)[0]
        assert [token for token in best.ids if token != 0] == expected


def test_cached_steps_equal_recomputation(tmp_path):
    from lexmill.inference.torch_backend import TorchSession, all_logits

    reference = theirs("t5 1.1")
    reference.save_pretrained(tmp_path)
    network = lexmill.load(tmp_path).network
    source, written = TOKENS[0].tolist(), [0]
    session = TorchSession(network, source)
    row = session.read([0])
    for _ in range(20):
        whole = all_logits(network, source, written)[-1]
        assert np.abs(row - whole).max() < 1e-5 and row.argmax() == whole.argmax()
        written.append(int(row.argmax()))
        row = session.read([written[-1]])


@pytest.mark.parametrize("case", ["bert for pretraining", "modernbert", "t5 1.1", "qwen3"])
def test_a_pair_of_packed_rows_equals_each_text_alone(case, tmp_path):
    """Documents that share a row do not see each other, in any shape."""
    from lexmill.train.batches import pack
    from lexmill.train.examples import Example

    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    model = lexmill.load(tmp_path).network
    sizes = [17, 9, 23]
    examples = [
        Example(
            TOKENS[0, :size].numpy(),
            TOKENS[0, :size].numpy(),
            decoder_tokens=WRITTEN[0, : size // 2].numpy() if "t5" in case else None,
        )
        for size in sizes
    ]
    if "t5" in case:
        examples = [
            Example(one.tokens, one.decoder_tokens, decoder_tokens=one.decoder_tokens) for one in examples
        ]
    batch = pack(examples, 60, 0, 40 if "t5" in case else 0)
    assert len(batch.tokens) == 1
    with torch.no_grad():
        if "t5" in case:
            memory = model.encode(batch.tensor("tokens"), batch.mask(causal=False))
            packed = model.decode(
                batch.tensor("decoder_tokens"), memory, batch.decoder_mask(), batch.memory_mask()
            )
            document = batch.decoder_document[0]
        else:
            packed = model.hidden(
                batch.tensor("tokens"), batch.row_positions(), batch.mask(causal=case == "qwen3")
            )
            document = batch.document[0]
        for number, size in enumerate(sorted(sizes, reverse=True)):
            text = TOKENS[:1, :size]
            if "t5" in case:
                alone = model.decode(WRITTEN[:1, : size // 2], model.encode(text))
            else:
                alone = model.hidden(text)
            assert (packed[0, document == number][: alone.shape[1]] - alone[0]).abs().max() < 1e-5


BASE = dict(vocab_size=99, width=32, layers=2, heads=4, kv_heads=4, head_width=8, mlp_width=48, context=64)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"shape": "encoder"}, "no runtime holds"),
        ({"shape": "encoder_decoder", "decoder_layers": 1}, "no runtime holds"),
        ({"shape": "encoder_decoder"}, "decoder_layers"),
        ({"decoder_layers": 2}, "decoder_layers"),
        ({"positions": "learned"}, "no runtime holds"),
        ({"kv_heads": 3}, "multiple"),
        ({"nsp": True}, "pooler"),
        ({"mlm": True}, "does not fit llama"),
        ({"segments": 2}, "does not fit llama"),
        ({"dropout": 1.0}, "dropout"),
        ({"head_width": 7}, "even"),
    ],
)
def test_contradictory_shapes_are_refused(flags, said):
    from lexmill.errors import ConfigError

    with pytest.raises(ConfigError, match=said):
        ModelConfig(**{**BASE, **flags})
