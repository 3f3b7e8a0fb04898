"""Adapters in four places: PEFT, llama.cpp, and here unmerged and merged, all with the same answers."""

import json

import numpy as np
import pytest
import torch
from conftest import randomise

from lexmill.inference.language_model import load
from lexmill.model.adapter import LoraConfig
from lexmill.model.adapter_files import AdapterDirectory, write_adapter
from lexmill.model.build import build_loaded, build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import ModelDirectory, write_model_directory
from lexmill.model.lora import add_adapter, begin_adapter, read_adapter
from lexmill.runtimes.gguf_adapter import export_adapter_gguf, import_adapter
from lexmill.runtimes.llama_cpp import LlamaCpp, export_gguf
from lexmill.runtimes.merge import merge_adapter
from lexmill.tokenizer.training import TokenizerConfig, train_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "llama": {"kv_heads": 2},
    "llama-head": {"family": "llama", "kv_heads": 2, "tied": False},
    "qwen2": {"kv_heads": 2},
    "qwen3": {"kv_heads": 2},
    "bert": {"mlm": True, "mlm_bias": True},
    "modernbert": {"mlm": True},
    "t5": {"decoder_layers": 2, "tied": False},
}
AUTO = {"encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
IDS = [5, 17, 33, 2, 71, 8, 8, 90, 41, 12]


def shape_of(case, vocabulary=99):
    options = dict(SHAPES[case])
    family = options.pop("family", case)
    sizes = {
        "vocab_size": vocabulary,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "head_width": 16,
        "mlp_width": 96,
    }
    values = {
        "kv_heads": 4,
        "context": 128,
        **sizes,
        **FAMILIES[family],
        **FAMILY_DEFAULTS[family],
        **options,
    }
    return ModelConfig(**values)


def base_of(case, folder, tokenizer):
    config = shape_of(case, max(99, tokenizer.vocab_size))
    model = randomise(build_model(config), deviation=0.12, norms=0.1)
    return write_model_directory(folder, config, model.weights(), tokenizer)


def network(directory, adapter=None):
    model = build_loaded(directory.config, directory.weights())
    if adapter is not None:
        add_adapter(model, adapter)
    return model.eval()


def grown(directory, lora, deviation=0.1):
    """An adapter as after some training: nothing in it is zero."""
    model = network(directory)
    adapter = begin_adapter(model, lora, seed=1)
    add_adapter(model, adapter)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(deviation * torch.randn(parameter.shape))
    return read_adapter(model, adapter)


def logits(model):
    ids = torch.tensor([IDS])
    with torch.no_grad():
        return (
            model(ids, torch.tensor([[0, 4, 9]])) if model.config.shape == "encoder_decoder" else model(ids)
        )[0]


def theirs(model, shape):
    ids = torch.tensor([IDS])
    more = {"decoder_input_ids": torch.tensor([[0, 4, 9]])} if shape == "encoder_decoder" else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits[0]


def in_transformers(path, shape):
    kind = getattr(transformers, AUTO.get(shape, "AutoModelForCausalLM"))
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


LORAS = [
    LoraConfig(rank=4, alpha=8),
    LoraConfig(
        rank=3,
        alpha=5,
        rslora=True,
        rank_pattern={"layers.0.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 2.5},
    ),
    LoraConfig(rank=2, alpha=4, targets=("q_proj",)),
]


@pytest.mark.parametrize("case", SHAPES)
def test_our_adapter_gives_peft_s_logits_and_merges_exactly(case, tmp_path, any_tokenizer):
    base = base_of(case, tmp_path / "base", any_tokenizer)
    targets = ("q_proj", "lm_head") if case == "llama-head" else ("all-linear",)
    written = write_adapter(
        tmp_path / "adapter", grown(base, LoraConfig(rank=4, alpha=6, targets=targets)), base
    )
    unmerged = logits(network(base, written.adapter))
    assert (unmerged - logits(network(base))).abs().max() > 0.1, "the adapter does something"
    wrapped = peft.PeftModel.from_pretrained(
        in_transformers(base.path, base.config.shape), written.path
    ).eval()
    assert (theirs(wrapped, base.config.shape) - unmerged).abs().max() < 1e-4
    merged = merge_adapter(written, tmp_path / "merged")
    assert merged.dtypes == ("F32",) and merged.lost < 1e-5
    assert (logits(network(merged.model)) - unmerged).abs().max() < 1e-5 * unmerged.abs().max().clamp(min=1)
    plain = in_transformers(tmp_path / "merged", base.config.shape)
    assert (theirs(plain, base.config.shape) - unmerged).abs().max() < 1e-4


@pytest.mark.parametrize("number", range(len(LORAS)))
def test_an_adapter_that_peft_made_loads_here(number, tmp_path, any_tokenizer):
    ours = LORAS[number]
    base = base_of("llama", tmp_path / "base", any_tokenizer)
    settings = peft.LoraConfig(
        r=ours.rank,
        lora_alpha=ours.alpha,
        use_rslora=ours.rslora,
        rank_pattern=ours.rank_pattern,
        alpha_pattern=ours.alpha_pattern,
        target_modules="all-linear" if ours.targets == ("all-linear",) else list(ours.targets),
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(in_transformers(base.path, "decoder"), settings).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "theirs")
    read = AdapterDirectory.open(tmp_path / "theirs", base)
    assert read.adapter.config.rank_pattern == ours.rank_pattern
    found = logits(network(base, read.adapter))
    assert (found - theirs(wrapped, "decoder")).abs().max() < 1e-4
    # the same modules as we would choose
    assert set(read.adapter.changes) == {layer.huggingface for layer in ours.adapted(base.config)}
    # through our own files and back into PEFT
    again = import_adapter(tmp_path / "theirs", base.path, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(in_transformers(base.path, "decoder"), again.path).eval()
    assert (theirs(back, "decoder") - found).abs().max() < 1e-4


def test_weights_that_peft_saved_whole_load_here(tmp_path, any_tokenizer):
    base = base_of("llama-head", tmp_path / "base", any_tokenizer)
    settings = peft.LoraConfig(
        r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "model.norm"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(in_transformers(base.path, "decoder"), settings).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "theirs")
    read = AdapterDirectory.open(tmp_path / "theirs", base)
    assert set(read.adapter.replaced) == {"head.weight", "decoder.norm.weight"}
    found = logits(network(base, read.adapter))
    assert (found - theirs(wrapped, "decoder")).abs().max() < 1e-4
    ours = write_adapter(tmp_path / "ours", read.adapter, base)
    back = peft.PeftModel.from_pretrained(in_transformers(base.path, "decoder"), ours.path).eval()
    assert (theirs(back, "decoder") - found).abs().max() < 1e-4
    merged = merge_adapter(ours, tmp_path / "merged").model
    assert (logits(network(merged)) - found).abs().max() < 1e-4


@pytest.mark.parametrize("number", range(len(LORAS)))
@pytest.mark.parametrize("case", ["llama", "llama-head", "qwen2", "qwen3"])
def test_llama_cpp_gives_the_same_log_probabilities(case, number, tmp_path, tokenizer):
    base = base_of(case, tmp_path / "base", tokenizer)
    written = write_adapter(tmp_path / "adapter", grown(base, LORAS[number]), base)
    file = export_adapter_gguf(written, tmp_path / "adapter.gguf")
    prompts = [IDS[:4], IDS]
    expected = torch.log_softmax(logits(network(base, written.adapter))[[3, 9]].double(), -1).numpy()
    with LlamaCpp(export_gguf(base, tmp_path / "base.gguf", "f32"), adapter=file) as server:
        found = server.logprobs(prompts, base.config.vocab_size)
        assert np.abs(found - expected).max() < 2e-4
        greedy = server.greedy(IDS, 12)
    model = load(written.path)
    assert greedy == model.generate_ids(IDS, max_tokens=12)
    merged = merge_adapter(written, tmp_path / "merged").model
    assert greedy == load(merged.path).generate_ids(IDS, max_tokens=12)
    wrapped = peft.PeftModel.from_pretrained(in_transformers(base.path, "decoder"), written.path).eval()
    said = wrapped.generate(input_ids=torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[
        0, len(IDS) :
    ].tolist()
    stop = base.tokenizer.ids.stop
    assert greedy == said[: next((at for at, token in enumerate(said) if token in stop), len(said))]


def test_a_gguf_adapter_comes_back_as_it_was(tmp_path, any_tokenizer):
    base = base_of("llama", tmp_path / "base", any_tokenizer)
    for number, lora in enumerate(LORAS):
        written = write_adapter(tmp_path / f"adapter{number}", grown(base, lora), base)
        file = export_adapter_gguf(written, tmp_path / "adapter.gguf")
        again = import_adapter(file, base.path, tmp_path / f"again{number}")
        expected = logits(network(base, written.adapter))
        assert (logits(network(base, again.adapter)) - expected).abs().max() < 1e-5
        wrapped = peft.PeftModel.from_pretrained(in_transformers(base.path, "decoder"), again.path).eval()
        assert (theirs(wrapped, "decoder") - expected).abs().max() < 1e-4


def test_gguf_s_own_reader_finds_what_llama_cpp_wants(tmp_path, any_tokenizer):
    gguf = pytest.importorskip("gguf")
    base = base_of("llama", tmp_path / "base", any_tokenizer)
    written = write_adapter(tmp_path / "adapter", grown(base, LoraConfig(rank=4, alpha=6, rslora=True)), base)
    reader = gguf.GGUFReader(export_adapter_gguf(written, tmp_path / "adapter.gguf", "f16"))
    keys = gguf.constants.Keys
    assert reader.fields[keys.General.TYPE].contents() == gguf.GGUFType.ADAPTER
    assert reader.fields[keys.Adapter.TYPE].contents() == "lora"
    assert reader.fields[keys.Adapter.LORA_ALPHA].contents() == pytest.approx(
        6 * 2
    )  # alpha / sqrt(4) = 12 / 4
    assert {tensor.name.rpartition(".")[2] for tensor in reader.tensors} == {"lora_a", "lora_b"}


def test_bert_adapters_in_llama_cpp(tmp_path, prose):
    words = train_tokenizer([prose[:20_000]], TokenizerConfig(kind="wordpiece", vocab_size=300))
    base = base_of("bert", tmp_path / "base", words)
    written = write_adapter(
        tmp_path / "a", grown(base, LoraConfig(rank=4, targets=("query", "output.dense"))), base
    )
    file = export_adapter_gguf(written, tmp_path / "adapter.gguf")
    model = load(written.path)
    from lexmill.inference.torch_backend import hidden_rows

    expected = hidden_rows(model.network, [IDS])[0].mean(0)
    plain = hidden_rows(load(base.path).network, [IDS])[0].mean(0)
    with LlamaCpp(export_gguf(base, tmp_path / "base.gguf", "f32"), adapter=file, embeddings=True) as server:
        found = server.embed(IDS)

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine(found, expected) > 0.99999 > cosine(plain, expected)


def test_peft_does_not_mind_what_else_lies_there(tmp_path, any_tokenizer):
    base = base_of("llama", tmp_path / "base", any_tokenizer)
    written = write_adapter(tmp_path / "adapter", grown(base, LORAS[0]), base)
    told = json.loads((written.path / "adapter_config.json").read_text("utf-8"))
    assert peft.PeftConfig.from_pretrained(str(written.path)).r == told["r"] == 4
    assert ModelDirectory.open(told["base_model_name_or_path"]).config == base.config
    assert AdapterDirectory.open(written.path).base.path.resolve() == base.path.resolve()
