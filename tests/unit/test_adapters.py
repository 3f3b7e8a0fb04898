"""Adapters: settings, what learns, files that may be hostile, quantised bases, blocks that are computed again."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import ConfigError, FileError, FormatError, LexmillError, ModelError
from lexmill.formats.blocks import BLOCK_TYPES, decode, encode
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.safetensors_writing import write_safetensors
from lexmill.inference.language_model import find_model, load
from lexmill.model.adapter import QUANTISED_TYPES, LoraConfig, MergedWeights
from lexmill.model.adapter_files import AdapterDirectory, is_adapter, write_adapter
from lexmill.model.build import build_loaded, build_model
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.lora import add_adapter, begin_adapter, read_adapter
from lexmill.model.names import linear_layers, matrices_in_blocks, weight_shapes
from lexmill.model.quantised import QuantisedLinear, build_quantised
from lexmill.model.stack import Stack
from lexmill.runtimes.gguf_adapter import export_adapter_gguf, import_adapter, read_adapter_gguf
from lexmill.runtimes.merge import merge_adapter
from lexmill.train.config import TrainConfig
from lexmill.train.optimizers import OptimizerSet
from lexmill.train.parallel import recompute_blocks

FAMILY_NAMES = list(FAMILIES)


def shape_of(family, **more):
    sizes = {"vocab_size": 99, "width": 64, "layers": 2, "heads": 4, "kv_heads": 4, "head_width": 16}
    layers = {"decoder_layers": 2} if family == "t5" else {}
    values = {
        **sizes,
        "mlp_width": 96,
        "context": 64,
        **FAMILIES[family],
        **FAMILY_DEFAULTS[family],
        **layers,
    }
    return ModelConfig(**values | more)


def loss_of(model):
    """Something that every part of the model has a share in."""
    ids = torch.arange(24).reshape(2, 12) % 90
    shape = model.config.shape
    out = model.hidden(ids) if shape != "encoder_decoder" else model.decode(ids, model.encode(ids))
    return (out * torch.linspace(-1, 1, out.shape[-1])).square().mean()


@pytest.fixture(scope="module")
def base(model_path):
    return ModelDirectory.open(model_path)


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory, base):
    """An adapter in which nothing is zero."""
    model = build_loaded(base.config, base.weights())
    adapter = begin_adapter(model, LoraConfig(rank=4, alpha=8), seed=1)
    add_adapter(model, adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return write_adapter(
        tmp_path_factory.mktemp("adapters") / "adapter", read_adapter(model, adapter), base
    ).path


@pytest.fixture
def copied(adapter_path, tmp_path):
    """The adapter's files, to be damaged."""
    return shutil.copytree(adapter_path, tmp_path / "copy")


# Settings and names


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_matrix_is_a_layer_once(family):
    config = shape_of(family)
    shapes = weight_shapes(config)
    owns = [own for layer in linear_layers(config) for own in layer.owns]
    tables = ("embed.weight", "relative.weight")
    assert sorted(f"{own}.weight" for own in owns) == sorted(
        name for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(tables)
    )
    for layer in linear_layers(config):
        assert [shapes[f"{own}.weight"] for own in layer.owns] == [
            (rows, layer.inputs) for rows in layer.rows
        ]
    model = build_model(config)
    assert all(isinstance(model.get_submodule(own), torch.nn.Linear) for own in owns)


def test_names_mean_what_they_mean_in_peft():
    config = shape_of("llama", tied=False)
    modules = [layer.huggingface for layer in LoraConfig().adapted(config)]
    assert "lm_head" not in modules and len(modules) == 14
    assert len(LoraConfig(targets=("q_proj", "down_proj")).adapted(config)) == 4
    assert len(LoraConfig(targets=("layers.1.self_attn.q_proj",)).adapted(config)) == 1
    lora = LoraConfig(
        rank=8, rank_pattern={"^model.layers.0.mlp.up_proj": 2, "up_proj": 4}, alpha_pattern={"up_proj": 6}
    )
    assert [lora.rank_of(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1)] == [2, 4]
    assert lora.rank_of("model.layers.0.mlp.gate_proj") == 8
    assert lora.scale_of("model.layers.1.mlp.up_proj", 4) == 1.5
    assert LoraConfig(alpha=8, rslora=True).scale_of("x", 16) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ("q_pro",)}, "Did you mean 'q_proj'"),
        ({"targets": ("lm_head",)}, "is its embedding"),
        ({"rank_pattern": {"nothing": 2}}, "no module 'nothing'"),
    ],
)
def test_targets_that_are_not_there(settings, said, base):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**settings).adapted(base.config)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0}, {"rank": True}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"targets": ()},
        {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": "x"}}, {"quantise": "q2_k"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError):
        LoraConfig(**settings)


def test_the_embedding_cannot_be_saved_apart_from_the_head(base):
    with pytest.raises(ConfigError, match="in one"):
        LoraConfig(modules_to_save=("embed_tokens",)).saved(base.config)
    assert LoraConfig(modules_to_save=("model.norm",)).saved(base.config) == ["decoder.norm.weight"]


# What learns


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_fresh_adapter_changes_nothing_and_alone_learns(family):
    config = shape_of(family)
    model = randomise(build_model(config))
    before = loss_of(model).detach()
    adapter = begin_adapter(model, LoraConfig(rank=4), seed=3)
    add_adapter(model, adapter)
    loss = loss_of(model)
    assert torch.equal(loss.detach(), before) or torch.allclose(loss, before, rtol=1e-6)
    loss.backward()
    learned = {name for name, one in model.named_parameters() if one.grad is not None}
    assert learned == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(".lora_" in name for name in learned)
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == adapter.parameters
    again = begin_adapter(randomise(build_model(config)), LoraConfig(rank=4), seed=3)
    assert all(
        np.array_equal(change.a, again.changes[module].a) for module, change in adapter.changes.items()
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_optimiser_holds_state_for_the_adapter_alone(optimizer):
    model = randomise(build_model(shape_of("llama")))
    adapter = begin_adapter(model, LoraConfig(rank=4), seed=3)
    add_adapter(model, adapter)
    config = TrainConfig(steps=1, optimizer=optimizer)
    optimizers = OptimizerSet.of_run(model, config, "float32")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for _ in range(2):  # A has a gradient once B is not zero
        loss_of(model).backward()
        optimizers.step(1.0)
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name, one in model.named_parameters() if one.requires_grad}
    numbers = sum(value.size for value in optimizers.state().values() if value.ndim)
    assert numbers == adapter.parameters * (1 if optimizer == "muon" else 2)


def test_dropout_is_for_training_only():
    model = randomise(build_model(shape_of("llama")))
    adapter = begin_adapter(model, LoraConfig(rank=4, dropout=0.5), seed=3)
    for change in adapter.changes.values():
        change.b[:] = 0.1
    add_adapter(model, adapter)
    assert torch.equal(loss_of(model.eval()), loss_of(model))
    model.train()
    torch.manual_seed(0)
    first = loss_of(model)
    assert not torch.equal(first, loss_of(model))


def test_an_output_projection_can_be_adapted():
    config = shape_of("llama", tied=False)
    model = randomise(build_model(config))
    add_adapter(model, begin_adapter(model, LoraConfig(rank=2, targets=("lm_head",)), seed=0))
    from lexmill.train.cross_entropy import linear_cross_entropy

    hidden = torch.randn(5, config.width)
    loss, _ = linear_cross_entropy(hidden, torch.arange(5), model.head_weight)
    loss.backward()
    plain = torch.nn.functional.cross_entropy(hidden @ model.head_weight.T, torch.arange(5), reduction="sum")
    gradients = torch.autograd.grad(plain, [model.head.lora_b])
    assert torch.allclose(model.head.lora_b.grad, gradients[0], atol=1e-5)


# Blocks that are computed again


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(family, adapted):
    config = shape_of(family, dropout=0.1)
    model = randomise(build_model(config)).train()
    if adapted:
        lora = LoraConfig(rank=4, dropout=0.1)
        add_adapter(model, begin_adapter(model, lora, seed=3))
    found = []
    for recompute in (False, True):
        recompute_blocks(model, recompute)
        assert all(one.recompute is recompute for one in model.modules() if isinstance(one, Stack))
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        loss = loss_of(model)
        loss.backward()
        found.append(
            (
                loss.detach(),
                {name: one.grad for name, one in model.named_parameters() if one.grad is not None},
            )
        )
    (loss, kept), (again, recomputed) = found
    assert torch.equal(loss, again) and kept.keys() == recomputed.keys() and kept
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


# Quantised bases


@pytest.mark.parametrize("type", QUANTISED_TYPES)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-6, 1.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_torch_decodes_as_the_formats_do(type, seed, scale):
    kind = BLOCK_TYPES[type.upper()]
    weight = (np.random.default_rng(seed).standard_normal((6, 64)) * scale).astype(np.float32)
    expected = decode(encode(weight, kind), kind, weight.shape)
    assert np.array_equal(QuantisedLinear(weight, None, kind).weight.numpy(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_layer_passes_its_gradient_on(bias):
    random = np.random.default_rng(0)
    weight = random.standard_normal((48, 64)).astype(np.float32)
    values = random.standard_normal(48).astype(np.float32) if bias else None
    layer = QuantisedLinear(weight, values, BLOCK_TYPES["Q8_0"])
    x = torch.randn(3, 5, 64, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    dense = torch.nn.functional.linear(x.detach(), layer.weight, layer.bias)
    assert torch.allclose(out, dense, atol=1e-5)
    assert torch.allclose(x.grad, 2 * dense @ layer.weight, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not list(layer.parameters()) or not layer.bias.requires_grad


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_quantised_model_computes_with_what_its_blocks_say(family):
    config = shape_of(family)
    weights = randomise(build_model(config)).weights()
    model, whole = build_quantised(config, weights, "q8_0")
    assert not whole and not any(one.is_meta for one in model.parameters())
    kind = BLOCK_TYPES["Q8_0"]
    inside = matrices_in_blocks(config)
    rounded = {
        own: decode(encode(weight, kind), kind, weight.shape) if own in inside else weight
        for own, weight in weights.items()
    }
    plain = build_loaded(config, rounded)
    assert torch.allclose(loss_of(model.eval()), loss_of(plain.eval()), rtol=1e-5)
    kept = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    assert kept < 0.6 * sum(one.nbytes for one in weights.values())


def test_layers_that_do_not_divide_stay_whole():
    config = shape_of("llama", width=48, mlp_width=64)
    model, whole = build_quantised(config, randomise(build_model(config)).weights(), "q4_0")
    assert "decoder.blocks.0.mlp.gate" in whole and "decoder.blocks.0.mlp.down" not in whole
    loss_of(model)


def test_an_adapter_on_a_quantised_base_learns(tmp_path, base):
    model, _ = build_quantised(base.config, base.weights(), "q4_1")
    lora = LoraConfig(rank=4, quantise="q4_1")
    adapter = begin_adapter(model, lora, seed=0)
    add_adapter(model, adapter)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    written = write_adapter(tmp_path / "adapter", read_adapter(model, adapter), base)
    assert written.quantised == "q4_1"
    trained = loss_of(model.eval()).detach()
    found = {}
    for as_trained in (False, True):
        merged = merge_adapter(written, tmp_path / f"merged-{as_trained}", as_trained=as_trained)
        assert "q4_1" in " ".join(merged.said())
        found[as_trained] = loss_of(load(merged.model.path).network).detach()
    assert torch.allclose(found[True], trained, rtol=1e-4), "what it learned on, it is merged into"
    assert not torch.allclose(found[False], trained, rtol=1e-4)
    quantised = load(written.path, quantise="q4_1")
    assert torch.allclose(loss_of(quantised.network), trained, rtol=1e-5)


# Merging


def test_merging_tells_what_rounding_took(adapter_path, tmp_path, base):
    exact = merge_adapter(adapter_path, tmp_path / "exact")
    rough = merge_adapter(adapter_path, tmp_path / "rough", dtype="bf16")
    assert exact.dtypes == ("F32",) and exact.lost < 1e-6
    assert rough.dtypes == ("BF16",) and 1e-3 < rough.lost < 1
    opened = AdapterDirectory.open(adapter_path)
    weights = opened.merged()
    errors = [
        np.abs(rough.model.weight(own) - (base.weight(own).astype(np.float64) + change)).max()
        for own in weights
        if (change := weights.change(own)) is not None
    ]
    assert rough.largest_error == pytest.approx(max(errors))
    assert "bf16" not in " ".join(exact.said()).lower()
    assert all(np.array_equal(exact.model.weight(own), weights[own]) for own in weights)
    same = base.path / "tokenizer.json"
    assert (exact.model.path / "tokenizer.json").read_bytes() == same.read_bytes()
    with pytest.raises(ModelError, match="not quantised"):
        merge_adapter(adapter_path, tmp_path / "no", as_trained=True)
    with pytest.raises(FileError, match="is the model itself"):
        merge_adapter(adapter_path, base.path)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 6), alpha=st.floats(0.1, 64), rslora=st.booleans())
@settings(max_examples=15, deadline=None)
def test_merged_and_unmerged_agree(seed, rank, alpha, rslora):
    model = randomise(build_model(shape_of("qwen3")), seed=seed)
    adapter = begin_adapter(model, LoraConfig(rank=rank, alpha=alpha, rslora=rslora), seed)
    random = np.random.default_rng(seed)
    for change in adapter.changes.values():
        change.b[:] = random.standard_normal(change.b.shape) * 0.1 / change.scale
    weights = model.weights()
    merged = build_loaded(model.config, MergedWeights(model.config, weights.__getitem__, adapter))
    add_adapter(model, adapter)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = model.eval()(ids), merged.eval()(ids)
    assert (one - other).abs().max() < 1e-5 * max(1.0, float(one.abs().max()))


# Files


def test_an_adapter_finds_its_base(adapter_path, base, tmp_path):
    assert is_adapter(adapter_path) and not is_adapter(base.path)
    assert load(adapter_path).path.resolve() == base.path.resolve()
    with pytest.raises(ModelError, match="lexmill merge"):
        find_model(adapter_path)
    # moved together, they find each other by the path between them
    moved = tmp_path / "elsewhere"
    shutil.copytree(adapter_path.parent, moved / adapter_path.parent.name)
    shutil.copytree(base.path.parent, moved / base.path.parent.name)
    opened = AdapterDirectory.open(moved / adapter_path.parent.name / adapter_path.name)
    assert moved.resolve() in opened.base.path.resolve().parents


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"peft_type": "IA3"}, ModelError, "'IA3'"),
        ({"use_dora": True}, ModelError, "use_dora"),
        ({"bias": "all"}, ModelError, "bias"),
        ({"lora_bias": True}, ModelError, "lora_bias"),
        ({"fan_in_fan_out": True}, ModelError, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, ModelError, "base model too"),
        ({"layer_replication": [[0, 1]]}, ModelError, "layer_replication"),
        ({"trainable_token_indices": [1]}, ModelError, "trainable_token_indices"),
        ({"of_tomorrow": {"x": 1}}, ModelError, "of_tomorrow"),
        ({"rank_pattern": {"(a+)+$": 2}}, ModelError, "no plain name"),
        ({"rank_pattern": [1]}, FormatError, "rank_pattern"),
        ({"target_modules": 5}, FormatError, "target_modules"),
        ({"r": "four"}, FormatError, "rank"),
        ({"r": 8}, FormatError, "ranks 4 and 4"),
        ({"lora_alpha": -1}, FormatError, "alpha"),
        ({"lora_dropout": None}, FormatError, "adapter_config.json"),
        ({"base_model_name_or_path": 7}, None, ""),
    ],
)
def test_settings_of_others_are_taken_or_refused(values, error, said, copied, base):
    change_config(copied, **values)
    if error is None:
        AdapterDirectory.open(copied, base)
        return
    with pytest.raises(error) as caught:
        AdapterDirectory.open(copied, base)
    assert said in str(caught.value)


def test_a_base_that_is_not_there_is_told(copied):
    change_config(copied, base_model_name_or_path="someone/model")
    (copied / "lexmill.json").unlink()
    with pytest.raises(FileError, match="someone/model"):
        AdapterDirectory.open(copied)
    change_config(copied, base_model_name_or_path=None)
    with pytest.raises(FileError, match="does not say"):
        AdapterDirectory.open(copied)


def tensors_of(folder):
    from lexmill.formats.safetensors import SafetensorsFile

    with SafetensorsFile.open(folder / "adapter_model.safetensors") as file:
        return {name: np.array(file.array(name)) for name in file.names()}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda found: found.pop(FIRST), FormatError, "only one half"),
        (lambda found: found.update({FIRST: found[FIRST][:, :-1].copy()}), ModelError, "has the shapes"),
        (lambda found: found.update({FIRST: found[FIRST][:2].copy()}), FormatError, "the ranks 2 and 4"),
        (lambda found: found.update({FIRST: found[FIRST][0].copy()}), FormatError, "1 axes"),
        (lambda found: found[FIRST].__setitem__((0, 0), np.nan), FormatError, "no number"),
        (lambda found: found.update({FIRST.replace("0", "7"): found[FIRST]}), ModelError, "no place"),
        (lambda found: found.update({"x": found[FIRST]}), ModelError, "no place"),
        (lambda found: found.clear(), FormatError, "empty"),
        (lambda found: found.update({FIRST: found[FIRST].astype(np.int32)}), FormatError, "no float"),
    ],
)
def test_damaged_tensors_are_refused(change, error, said, copied, base):
    found = tensors_of(copied)
    change(found)
    write_safetensors(copied / "adapter_model.safetensors", found)
    with pytest.raises(error) as caught:
        AdapterDirectory.open(copied, base)
    assert said in str(caught.value)


def test_pickles_are_not_read(copied, base):
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        AdapterDirectory.open(copied, base)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_settings_break_the_reader(data, tmp_path_factory, adapter_path, base):
    keys = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "modules_to_save",
        "lora_dropout",
    )
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )
    folder = tmp_path_factory.mktemp("fuzz") / "copy"
    shutil.copytree(adapter_path, folder)
    change_config(
        folder, **data.draw(st.dictionaries(st.sampled_from(keys) | st.text(max_size=9), value, max_size=3))
    )
    with contextlib.suppress(LexmillError):  # said, and no other exception
        AdapterDirectory.open(folder, base)


# GGUF files


@pytest.fixture(scope="module")
def gguf_path(adapter_path, tmp_path_factory):
    return export_adapter_gguf(adapter_path, tmp_path_factory.mktemp("gguf") / "adapter.gguf")


def test_a_gguf_adapter_of_another_model_is_refused(gguf_path):
    with GGUFFile.open(gguf_path) as file:
        with pytest.raises(ModelError, match=r"general\.architecture"):
            read_adapter_gguf(file, shape_of("qwen2"))
        with pytest.raises(ModelError, match="instead of"):
            read_adapter_gguf(file, shape_of("llama", width=32, head_width=8))
        with pytest.raises(ModelError, match="no place"):
            read_adapter_gguf(file, shape_of("llama", layers=1))


def test_what_a_gguf_adapter_cannot_hold_is_said(base, tmp_path):
    model = build_model(base.config)
    adapter = begin_adapter(model, LoraConfig(targets=("q_proj",), modules_to_save=("model.norm",)), 0)
    written = write_adapter(tmp_path / "adapter", adapter, base)
    with pytest.raises(ModelError, match="whole weights"):
        export_adapter_gguf(written, tmp_path / "adapter.gguf")
    with pytest.raises(ConfigError, match="q8_0"):
        export_adapter_gguf(written, tmp_path / "adapter.gguf", "q8_0")
    assert not (tmp_path / "adapter.gguf").exists()


@given(at=st.integers(0, 4000), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=80, deadline=None)
def test_damaged_gguf_adapters_are_refused_in_words(at, byte, cut, gguf_path, base, tmp_path_factory):
    data = bytearray(gguf_path.read_bytes())
    at %= len(data)
    damaged = bytes(data[:at]) if cut else bytes(data[:at]) + bytes([byte]) + bytes(data[at + 1 :])
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "adapter.gguf").write_bytes(damaged)
    try:
        import_adapter(folder / "adapter.gguf", base.path, folder / "out")
    except LexmillError:
        assert not (folder / "out" / "adapter_config.json").exists()


# Ollama


def test_ollama_gets_the_adapter_behind_the_model(adapter_path, gguf_path, base, tmp_path):
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.ollama import install, write_modelfile
    from lexmill.runtimes.ollama_manifest import ADAPTER, MODEL
    from lexmill.runtimes.ollama_names import ModelName
    from lexmill.runtimes.ollama_show import show_model
    from lexmill.runtimes.ollama_store import Store

    model = export_gguf(base, tmp_path / "model.gguf", "f16")
    shutil.copyfile(gguf_path, tmp_path / "adapter.gguf")
    text = write_modelfile(base, model, tmp_path / "Modelfile", adapter=tmp_path / "adapter.gguf").read_text(
        "utf-8"
    )
    assert "\nFROM ./model.gguf\n" in text and "\nADAPTER ./adapter.gguf\n" in text
    store, name = Store(tmp_path / "store"), ModelName.parse("tuned")
    install(base, name, store, gguf=model, adapter=gguf_path)
    layers = store.read(name).layers
    assert [layer.media_type for layer in layers[:2]] == [MODEL, ADAPTER]
    assert store.blob_path(layers[1]).read_bytes() == gguf_path.read_bytes()
    assert "ADAPTER" in show_model(store, name).modelfile()
