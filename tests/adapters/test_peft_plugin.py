"""DePT as a PEFT method, on tiny random models: PEFT's own behaviours, and the numbers of our own model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY, random_labels
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    PeftModel,
    PeftModelForSeq2SeqLM,
    PromptTuningConfig,
    get_base_model_state_dict,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from plugged import (  # noqa: E402
    Load,
    M,
    R,
    S,
    Text,
    close,
    config,
    generated,
    logits,
    ours,
    padded,
    several,
    shaken,
    trained,
)

from dept_vl.adapters.attach import attach, new_prompt  # noqa: E402
from dept_vl.adapters.peft.plugin import DeptLayer, DeptModel  # noqa: E402
from dept_vl.models.backbone import Backbone  # noqa: E402
from dept_vl.prompts.base import sized  # noqa: E402

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
}

T5_LIKE = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
BART_LIKE: dict[str, Any] = {
    **{
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("ffn_dim", 32))
    },
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
}
GEMMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


@pytest.fixture
def load(folder: Path) -> Load:
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture
def text(folder: Path) -> Text:
    return padded(folder)


# The same numbers as everywhere else.


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sizes", [{}, {"prompt_length": 0}, {"rank": 0}], ids=["both", "offset", "prompt"])
def test_forward_and_generate_are_those_of_our_own_model(
    load: Load, folder: Path, make_backbone: Callable[..., Backbone], side: str, sizes: dict[str, int]
) -> None:
    text = padded(folder, side)
    model = trained(load(), **sizes)
    own = ours(model, make_backbone(folder.name, None, visual_position_bias="relative"))
    labels = random_labels((3, 3, 3))
    with torch.no_grad():
        theirs, mine = model(**text, labels=labels), own(**text, labels=labels)
    close(theirs.logits, mine.logits)
    close(theirs.loss, mine.loss)
    for options in DECODING.values():
        assert torch.equal(generated(model, text, **options), generated(own, text, **options))
    assert not torch.equal(generated(model, text), generated(load(), text))


def test_untrained_is_pefts_own_prompt_tuning(load: Load, text: Text, folder: Path) -> None:
    model = get_peft_model(load(), config()).eval()
    plain = get_peft_model(load(), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=M)).eval()
    prompt = model.get_base_model().get_encoder().dept_prompt["default"].soft_prompt
    with torch.no_grad():
        plain.prompt_encoder["default"].embedding.weight[:M].copy_(prompt)
    close(logits(model, text), logits(plain, text))
    if folder.name == "t5":  # PEFT 0.21's prompt tuning lets generate count BART's text from 0
        assert torch.equal(generated(model, text), generated(plain, text))


def test_embeddings_instead_of_tokens(load: Load, text: Text) -> None:
    model = trained(load())
    embeds = model.get_base_model().get_encoder().get_input_embeddings()(text["input_ids"])
    as_embeds = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
    labels = random_labels((3, 3, 3))
    with torch.no_grad():
        close(model(**as_embeds, labels=labels).logits, model(**text, labels=labels).logits)
    torch.manual_seed(5)
    tokens = model.generate(**as_embeds, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(tokens, generated(model, text))


def test_a_mask_may_be_missing_or_have_holes(load: Load, folder: Path) -> None:
    model = trained(load())
    full = padded(folder, lengths=(5, 5))
    close(logits(model, {"input_ids": full["input_ids"]}), logits(model, full))
    holes = {**full, "attention_mask": torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])}
    without = {k: v[:1, [0, 2, 3]] for k, v in holes.items()}
    close(logits(model, holes)[:1], logits(model, without))


def test_what_the_encoder_gives_is_in_the_order_of_its_input(load: Load, folder: Path) -> None:
    model = trained(load())
    options = {"output_hidden_states": True, "output_attentions": True}
    model.get_base_model().set_attn_implementation("eager")
    labels = random_labels((3, 3, 3))
    with torch.no_grad():
        right = model(**padded(folder), labels=labels, **options)
        left = model(**padded(folder, "left"), labels=labels, **options)
    missing = 7 - 4
    for a, b in zip(right.encoder_hidden_states, left.encoder_hidden_states, strict=True):
        assert a.shape[1] == M + 7
        close(a[1, : M + 4], b[1, [*range(M), *range(M + missing, M + 7)]])
    for a, b in zip(right.encoder_attentions, left.encoder_attentions, strict=True):
        columns = [*range(M), *range(M + missing, M + 7)]
        close(a[1, :, : M + 4, : M + 4], b[1][:, columns][:, :, columns])
    plain = model.get_base_model().get_encoder()(**padded(folder), return_dict=False)
    assert isinstance(plain, tuple)


def test_encoder_outputs_may_be_given(load: Load, text: Text) -> None:
    model = trained(load())
    with torch.no_grad():
        encoded = model.get_base_model().get_encoder()(**text)
    mask = {"attention_mask": text["attention_mask"]}
    labels = random_labels((3, 3, 3))
    with torch.no_grad():
        given = model(encoder_outputs=encoded, **mask, labels=labels).logits
    close(given, logits(model, text))
    longer = torch.cat([torch.ones(3, M, dtype=torch.long), text["attention_mask"]], dim=1)
    with torch.no_grad():
        close(model(encoder_outputs=encoded, attention_mask=longer, labels=labels).logits, given)


def test_no_second_prompt_is_attached(load: Load) -> None:
    model = trained(load()).get_base_model()
    with pytest.raises(ValueError, match="has a prompt already"):
        attach(model, new_prompt(model, prompt_length=2, rank=1, max_source_length=8))


@pytest.mark.parametrize("side", ["right", "left"])
def test_mixed_rows_are_those_of_one_adapter_at_a_time(load: Load, folder: Path, side: str) -> None:
    model, base = several(load), load()
    names = ["b", "__base__", "a", "c", "a"]
    text = padded(folder, side, (7, 4, 5, 6, 7))
    mixed = logits(model, text, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                close(logits(model, text)[row], mixed[row])
            close(logits(base, text)[row], mixed[row])
        else:
            model.set_adapter(name)
            close(logits(model, text)[row], mixed[row])
    for options in (DECODING["greedy"], DECODING["beams"]):
        copies = options.get("num_return_sequences", 1)
        tokens = generated(model, text, adapter_names=names, **options)
        for row, name in enumerate(names):
            one = base if name == "__base__" else model
            if name != "__base__":
                model.set_adapter(name)
            expected = generated(one, text, **options)
            places = slice(row * copies, (row + 1) * copies)
            assert torch.equal(tokens[places], expected[places])


def test_rows_all_of_the_base_are_the_base_and_leave_no_trace(load: Load, text: Text) -> None:
    model = several(load)
    before = logits(model, text)
    close(logits(model, text, adapter_names=["__base__"] * 3), logits(load(), text))
    close(logits(model, text), before)


def test_modules_to_save_follow_the_rows(load: Load, text: Text) -> None:
    model = trained(load(), "a", modules_to_save=["lm_head"])
    model.add_adapter("b", config(modules_to_save=["lm_head"]))
    shaken(model, "b").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.modules_to_save.b" in name:
                parameter.normal_()
    names = ["a", "b", "__base__"]
    mixed = logits(model, text, adapter_names=names)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        close(logits(model, text)[row], mixed[row])
    close(logits(load(), text)[2], mixed[2])


def test_mixed_rows_are_checked(load: Load, text: Text) -> None:
    model = several(load)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): x, y"):
        logits(model, text, adapter_names=["y", "a", "x"])
    with pytest.raises(ValueError, match=r"number of inputs, but got 2 and 3"):
        logits(model, text, adapter_names=["a", "b"])
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        logits(model, text, adapter_names=["a", "a", "b"])
    decoder = model.get_base_model().get_decoder()
    assert len(decoder._forward_pre_hooks) == 1
    assert not model.get_base_model().get_encoder()._forward_pre_hooks


# Several adapters, on and off.


def test_adapters_are_switched(load: Load, text: Text) -> None:
    model, base = several(load), load()
    assert model.active_adapters == ["a"]
    a = logits(model, text)
    model.set_adapter("b")
    assert (model.active_adapter, model.active_adapters) == ("b", ["b"])
    b = logits(model, text)
    assert not torch.allclose(a, b, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, text), logits(base, text))
        assert torch.equal(generated(model, text), generated(base, text))
    close(logits(model, text), b)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    close(logits(model, text), b)
    assert not torch.equal(generated(model, text), generated(base, text))


def test_two_prompts_at_once_are_refused(load: Load, text: Text) -> None:
    model = several(load)
    before = logits(model, text)
    with pytest.raises(ValueError, match=r"one prompt is active at a time; got \['a', 'b'\]"):
        model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model, text), before)


def test_adapters_are_deleted(load: Load, text: Text) -> None:
    model, base = several(load), load()
    model.set_adapter("b")
    b = logits(model, text)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b", "c"]
    assert torch.equal(logits(model, text), b)
    with pytest.warns(UserWarning, match="Setting active adapter to c"):
        model.delete_adapter("b")
    assert model.active_adapters == ["c"]
    model.delete_adapter("c")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model, text), logits(base, text))
    assert not [name for name, _ in model.named_parameters() if "dept_" in name]
    with pytest.raises(ValueError, match="a does not exist"):
        model.delete_adapter("a")


def test_unload_restores_the_base(load: Load, text: Text) -> None:
    base = load()
    model = several(load)
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert not unloaded.get_decoder()._forward_pre_hooks
    mine, theirs = base.state_dict(), unloaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(unloaded, text), logits(base, text))
    again = get_peft_model(unloaded, config())
    assert len(again.get_base_model().get_decoder()._forward_pre_hooks) == 1


def test_unload_keeps_a_trained_module_as_with_any_method_of_peft(load: Load, text: Text) -> None:
    model = trained(load(), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    base = load()
    base.lm_head = head
    assert model.unload().lm_head is head
    assert torch.equal(logits(model.base_model.model, text), logits(base, text))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_reason(load: Load, text: Text, method: str) -> None:
    model = trained(load())
    before = logits(model, text)
    with pytest.raises(ValueError, match=r"cannot be merged into the weights: .* call unload\(\)"):
        getattr(model, method)()
    assert torch.equal(logits(model, text), before)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="prompts cannot be added up"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.get_base_model().get_encoder().merge()


# What PEFT says of a model.


def test_attributes_are_those_of_any_tuner(load: Load) -> None:
    model = get_peft_model(load(), config())
    assert type(model) is PeftModelForSeq2SeqLM
    assert isinstance(model.base_model, DeptModel)
    assert isinstance(model.base_model.model.get_encoder(), DeptLayer)
    assert model.base_model.prefix == model.prefix == "dept_"
    assert model.base_model.model.get_encoder().adapter_layer_names == ("dept_prompt",)
    assert model.peft_config["default"].peft_type.value == "DEPT"
    assert model.peft_type == "DEPT"
    assert model.modules_to_save is None
    assert not model.supports_lora_conversion()


def parameter_count(d_model: int) -> int:
    sizes = {"prompt_length": M, "rank": R, "max_source_length": S}
    return sized("dept", d_model=d_model, **sizes).parameter_count()


def test_only_the_prompt_is_trained_and_counted(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(load(), config())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("dept_prompt.")[2] for name in names} == {
        f"default.{name}" for name in ("soft_prompt", "offset_a", "offset_b")
    }
    count = parameter_count(D_MODEL)
    assert model.get_nb_trainable_parameters()[0] == count
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} ||" in capsys.readouterr().out
    model.get_base_model().get_encoder().eval()
    model(
        **{k: v[:, :3] for k, v in padded(Path("t5")).items()}, labels=random_labels((3, 3, 3))
    ).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_status(load: Load) -> None:
    model = several(load)
    (layer,) = model.get_layer_status()
    assert (layer.module_type, layer.enabled, layer.active_adapters) == ("dept.DeptLayer", True, ["a"])
    assert layer.available_adapters == ["a", "b", "c"]
    assert layer.requires_grad == {"a": True, "b": False, "c": False}
    assert layer.devices == {name: ["cpu"] for name in "abc"}
    status = model.get_model_status()
    assert status.adapter_model_type == "DeptModel"
    assert status.peft_types == dict.fromkeys("abc", "DEPT")
    assert status.trainable_params == parameter_count(D_MODEL)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


def test_base_state_dict_has_the_base_names(load: Load) -> None:
    expected = load().state_dict()
    found = get_base_model_state_dict(trained(load()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_and_pickles_are_models_of_their_own(load: Load, text: Text) -> None:
    model = trained(load())
    before = logits(model, text)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, text), before)
        with torch.no_grad():
            other.get_base_model().get_encoder().dept_prompt["default"].soft_prompt.zero_()
        assert not torch.allclose(logits(other, text), before, atol=1e-3)
        assert not other.unload().get_decoder()._forward_pre_hooks
    assert torch.equal(logits(model, text), before)


# Precision and memory.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(load: Load, text: Text, folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def half() -> PreTrainedModel:
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)

    def dtypes(model: PeftModel, name: str) -> set[torch.dtype]:
        return {p.dtype for n, p in model.named_parameters() if f"dept_prompt.{name}." in n}

    model = get_peft_model(half(), config())
    assert dtypes(model, "default") == {torch.float32}
    model(**text, labels=random_labels()).loss.backward()
    assert generated(model, text).shape == (3, 7)
    kept = get_peft_model(half(), config(), autocast_adapter_dtype=False)
    kept.add_adapter("added", config(), autocast_adapter_dtype=False)
    kept.save_pretrained(tmp_path)
    kept.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
    assert all(dtypes(kept, name) == {dtype} for name in ("default", "added", "loaded"))
    model(**text, labels=random_labels())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_changes_no_gradient(
    load: Load, text: Text, use_reentrant: bool, when: str
) -> None:
    def gradients(model: PeftModel) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model.train()
        model(**text, labels=random_labels()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    torch.manual_seed(1)
    expected = gradients(trained(load()))
    base = load()
    if when == "before":
        base.gradient_checkpointing_enable(**options)
    torch.manual_seed(1)
    model = trained(base)
    if when == "after":
        model.gradient_checkpointing_enable(**options)
        model.enable_input_require_grads()
    found = gradients(model)
    assert len(found) == 3
    for a, b in zip(expected, found, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_half_precision_under_autocast(load: Load, text: Text) -> None:
    model = trained(load())
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, text)
    torch.testing.assert_close(half.float(), logits(model, text), atol=0.5, rtol=0.1)


def bitsandbytes_config(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


def torchao_config() -> Any:
    from transformers import TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "make",
    [
        lambda: bitsandbytes_config(load_in_8bit=True),
        lambda: bitsandbytes_config(load_in_4bit=True),
        torchao_config,
    ],
    ids=["bitsandbytes 8", "bitsandbytes 4", "torchao"],
)
@pytest.mark.parametrize("folder", ["t5"], indirect=True)
def test_quantised_base(text: Text, tmp_path: Path, make: Callable[[], Any]) -> None:
    sizes = T5_LIKE | {"d_model": 64, "d_kv": 16, "d_ff": 64, "vocab_size": VOCABULARY}  # blocks are of 64
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes)).save_pretrained(tmp_path / "base")

    def quantised() -> PreTrainedModel:
        return AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", quantization_config=make())

    model = get_peft_model(peft.prepare_model_for_kbit_training(quantised()), config())
    model.train()
    model(**text, labels=random_labels()).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 3
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trainable)
    assert model.get_nb_trainable_parameters()[0] == parameter_count(64)
    model.eval()
    assert generated(model, text).shape == (3, 7)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, text), logits(model, text), atol=1e-2, rtol=1e-2)


# Other encoder-decoders.


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mt5", T5_LIKE),
        ("umt5", T5_LIKE),
        ("longt5", T5_LIKE),
        ("mbart", BART_LIKE),
        ("pegasus", BART_LIKE),
        ("marian", BART_LIKE),
        ("t5gemma", {"encoder": GEMMA_LIKE, "decoder": GEMMA_LIKE}),
    ],
)
@torch.no_grad()
def test_other_encoder_decoders(name: str, sizes: dict[str, Any]) -> None:
    base = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(name, vocab_size=VOCABULARY, **sizes)
    ).eval()
    pad = base.config.pad_token_id or 0
    text = {"input_ids": torch.randint(5, VOCABULARY, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    text["input_ids"][1, 4:], text["attention_mask"][1, 4:] = pad, 0
    labels = random_labels((3, 3))
    expected = base(**text, labels=labels).logits
    model = trained(base)
    found = model(**text, labels=labels).logits
    assert not torch.allclose(found, expected, atol=1e-3)
    shorter = {key: value[1:, :4] for key, value in text.items()}
    close(model(**shorter, labels=labels[1:]).logits[0], found[1])
    mixed = model(**text, labels=labels, adapter_names=["default", "__base__"]).logits
    close(mixed[0], found[0])
    close(mixed[1], expected[1])
    assert generated(model, text, num_beams=2).shape == (2, 7)
    with model.disable_adapter():
        assert torch.equal(model(**text, labels=labels).logits, expected)
