"""DePT as a PEFT method, on tiny random models: PEFT's own behaviours, and the numbers of our own model."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY, random_labels, random_text
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    AutoPeftModelForSeq2SeqLM,
    PeftModel,
    PeftModelForSeq2SeqLM,
    PromptTuningConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402

from dept_vl.adapters.adapter import Adapter  # noqa: E402
from dept_vl.adapters.peft.files import from_peft, to_peft  # noqa: E402
from dept_vl.adapters.peft.plugin import DeptConfig, DeptLayer, DeptModel, create_dept_optimizer  # noqa: E402
from dept_vl.models.backbone import Backbone  # noqa: E402
from dept_vl.models.prompted import PromptedModel  # noqa: E402
from dept_vl.prompts.base import sized  # noqa: E402
from dept_vl.prompts.dept import DePT  # noqa: E402

M, R, S, ALPHA = 4, 3, 12, 5.0
SIZES = {"prompt_length": M, "rank": R, "max_source_length": S, "alpha": ALPHA}
TEXT_PROMPT = {"prompt_init": "text", "prompt_init_text": "how many large red circles ?"}
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

Text = dict[str, Tensor]
Load = Callable[[], PreTrainedModel]


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


@pytest.fixture
def load(folder: Path) -> Load:
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture
def text(folder: Path) -> Text:
    return padded(folder)


def padded(folder: Path, side: str = "right", lengths: tuple[int, ...] = (7, 4, 5)) -> Text:
    class Tokens:  # all that `random_text` asks of a backbone
        tokenizer = type("T", (), {"pad_token_id": 0 if folder.name == "t5" else 1})

    return random_text(Tokens, lengths, side=side)  # type: ignore[arg-type]


def config(**changes: Any) -> DeptConfig:
    return DeptConfig(**{"task_type": "SEQ_2_SEQ_LM", **SIZES, **changes})


def trained(model: PreTrainedModel, adapter_name: str = "default", **changes: Any) -> PeftModel:
    """As after training: every tensor is far from where it starts."""
    wrapped = get_peft_model(model, config(**changes), adapter_name=adapter_name).eval()
    return shaken(wrapped, adapter_name)


def shaken(model: PeftModel, adapter_name: str) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"dept_prompt.{adapter_name}." in name:
                parameter.normal_()
    return model


@torch.no_grad()
def logits(model: Any, text: Text, **options: Any) -> Tensor:
    out: Tensor = model(**text, labels=random_labels((3,) * len(text["input_ids"])), **options).logits
    return out


def generated(model: Any, text: Text, **options: Any) -> Tensor:
    torch.manual_seed(5)
    tokens: Tensor = model.generate(**text, max_new_tokens=6, min_new_tokens=6, **options)
    return tokens


def rows(text: Text, row: int) -> Text:
    return {name: tensor[row : row + 1] for name, tensor in text.items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def ours(model: PeftModel, backbone: Backbone, adapter_name: str = "default") -> PromptedModel:
    """Our own model with the tensors of an adapter."""
    layer = model.get_base_model().get_encoder()
    return PromptedModel(backbone, copy.deepcopy(layer.dept_prompt[adapter_name])).eval()


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


# Rows with different adapters.


def several(load: Load) -> PeftModel:
    model = trained(load(), "a")
    for name, sizes in (("b", {"prompt_length": 7, "rank": 2}), ("c", {"prompt_length": 0, "alpha": 1.0})):
        model.add_adapter(name, config(**sizes))
        shaken(model, name)
    return model.eval()


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


# Files.


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip_is_exact(
    load: Load, text: Text, tmp_path: Path, safe: bool, low_cpu_mem_usage: bool
) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path, safe_serialization=safe)
    files = {"adapter_model.safetensors" if safe else "adapter_model.bin", "adapter_config.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == files
    loaded = PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, text), logits(model, text))
    assert torch.equal(generated(loaded, text), generated(model, text))
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert loaded.peft_config["default"].inference_mode
    assert not model.peft_config["default"].inference_mode
    trainable = PeftModel.from_pretrained(load(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    result = loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.missing_keys == []
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert loaded.active_adapters == ["default"]
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, text), logits(model, text))


def test_modules_to_save_are_saved(load: Load, text: Text, tmp_path: Path) -> None:
    model = trained(load(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    assert model.modules_to_save == {"lm_head"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(loaded, text), logits(model, text))


def test_selected_adapters_are_saved(load: Load, text: Text, tmp_path: Path) -> None:
    model = several(load)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["b"]
    loaded = PeftModel.from_pretrained(load(), tmp_path / "b", adapter_name="renamed")
    model.set_adapter("b")
    assert torch.equal(logits(loaded, text), logits(model, text))
    assert list(loaded.peft_config) == ["renamed"]


def test_configuration_and_card_say_what_there_is(load: Load, folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(), config(rank=None)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = (100 - M) * D_MODEL // (S + D_MODEL)
    expected = SIZES | {"rank": rank, "peft_type": "DEPT", "task_type": "SEQ_2_SEQ_LM"}
    assert expected.items() <= saved.items()
    assert saved["base_model_name_or_path"] == str(folder)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"base_model:adapter:{folder}" in card
    assert peft.PeftConfig.from_pretrained(tmp_path) == DeptConfig.from_pretrained(tmp_path)


def loaded_as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch, auto: str = "") -> Any:
    """Run the code of a card; `auto` takes the place of the class that loads the base."""
    code = (folder / "README.md").read_text().split("```python\n")[-1].split("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(re.sub(r"AutoModelForCausalLM(?=\W)", auto, code) if auto else code, names)
    return names["model"].eval()


def test_the_card_loads_it(load: Load, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded_as_the_card_says(tmp_path, monkeypatch), text), logits(model, text))


def test_auto_model_finds_the_base(load: Load, text: Text, tmp_path: Path) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, text), logits(model, text))


@pytest.mark.filterwarnings("ignore:Adapter name")
def test_adapter_names_within_one_another_are_told_apart(load: Load, tmp_path: Path) -> None:
    model = get_peft_model(load(), config())
    for name in ("default2", "other_default", "efaul", "ept"):
        model.add_adapter(name, config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3


def test_injection_needs_no_peft_model(load: Load, text: Text, folder: Path) -> None:
    model = trained(load())
    state = get_peft_model_state_dict(model)
    bare = inject_adapter_in_model(config(), load(), low_cpu_mem_usage=True)
    assert "meta" in {p.device.type for p in bare.parameters()}
    set_peft_model_state_dict(bare, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(bare, text), logits(model, text))
    again = inject_adapter_in_model(config(), load(), state_dict=get_peft_model_state_dict(bare))
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(bare).keys()


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers loads adapters with PEFT {MIN_PEFT_VERSION} or later alone",
)
def test_transformers_loads_switches_and_deletes(
    load: Load, text: Text, tmp_path: Path, folder: Path
) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path)
    base = load()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, text), logits(model, text))
    assert torch.equal(generated(base, text), generated(model, text))
    base.add_adapter(config(), "new")
    assert base.active_adapters() == ["new"]
    assert not torch.allclose(logits(base, text), logits(model, text), atol=1e-3)
    base.set_adapter("default")
    assert torch.equal(logits(base, text), logits(model, text))
    base.disable_adapters()
    assert torch.equal(logits(base, text), logits(load(), text))
    base.enable_adapters()
    base.delete_adapter(["default", "new"])
    assert torch.equal(logits(base, text), logits(load(), text))
    direct = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(direct, text), logits(model, text))


def test_hot_swapping_is_refused(load: Load, text: Text, tmp_path: Path) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path)
    before = logits(model, text)
    with pytest.raises(ValueError, match="DEPT was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model, text), before)


# Our own adapters, and PEFT's files.


def relative(make_backbone: Callable[..., Backbone], folder: Path) -> Backbone:
    return make_backbone(folder.name, None, visual_position_bias="relative")


def test_our_adapter_runs_in_peft(
    load: Load, text: Text, folder: Path, tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = relative(make_backbone, folder)
    own = PromptedModel(backbone, DePT(D_MODEL, **SIZES)).eval()
    with torch.no_grad():
        for parameter in own.prompt.parameters():  # type: ignore[union-attr]
            parameter.normal_()
    adapter = Adapter.of(own, task="rte", metrics={})
    to_peft(adapter, backbone, tmp_path / "theirs")
    model = PeftModel.from_pretrained(load(), tmp_path / "theirs")
    close(logits(model, text), logits(own, text))
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, adapter.tensors["prompt." + name.rpartition("dept_prompt.")[2]])
    # PEFT writes the same bytes, and also takes the tensors under our own names.
    model.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("theirs", "again")]
    assert files[0] == files[1]
    other = get_peft_model(load(), config()).eval()
    assert not set_peft_model_state_dict(other, adapter.tensors).unexpected_keys
    assert torch.equal(logits(other, text), logits(model, text))


def test_pefts_adapter_runs_here(
    load: Load, text: Text, folder: Path, tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    model = trained(load())
    model.save_pretrained(tmp_path / "theirs")
    backbone = relative(make_backbone, folder)
    adapter = from_peft(tmp_path / "theirs", backbone, task="rte", metrics={"accuracy": 70.5})
    assert (adapter.task, adapter.metrics) == ("rte", {"accuracy": 70.5})
    adapter.save(tmp_path / "ours")
    own = Adapter.load(tmp_path / "ours").build(relative(make_backbone, folder)).eval()
    close(logits(own, text), logits(model, text))
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert stored.keys() == {name for name in stored if name.startswith("base_model.model.")}
    for name, tensor in stored.items():
        assert torch.equal(tensor, adapter.tensors["prompt." + name.rpartition("dept_prompt.")[2]])


def test_what_the_other_side_cannot_run_is_refused(
    language_folders: dict[str, Path], tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    bart = make_backbone("bart", None)
    adapter = Adapter.of(PromptedModel(bart, DePT(D_MODEL, **SIZES)), task="rte", metrics={})
    with pytest.raises(ValueError, match="visual_position_bias='relative'"):
        to_peft(adapter, bart, tmp_path)
    t5 = make_backbone("t5")
    adapter = Adapter.of(PromptedModel(t5, DePT(D_MODEL, **SIZES)), task="rte", metrics={})
    with pytest.raises(ValueError, match=r"nothing else; this adapter has .*visual_projection"):
        to_peft(adapter, t5, tmp_path)
    gpt2 = make_backbone("gpt2", None)
    adapter = Adapter.of(PromptedModel(gpt2, DePT(D_MODEL, **SIZES)), task="rte", metrics={})
    with pytest.raises(ValueError, match="decoder-only"):
        to_peft(adapter, gpt2, tmp_path)
    assert not list(tmp_path.iterdir())
    model = trained(
        AutoModelForSeq2SeqLM.from_pretrained(language_folders["t5"]), modules_to_save=["lm_head"]
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="run it in PEFT"):
        from_peft(tmp_path, make_backbone("t5", None), task="rte")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "expected peft_type DEPT, found 'LORA'"),
        ({"rank": 2}, r"do not belong together.*'offset_a': \(12, 2\).*found .*'offset_a': \(12, 3\)"),
        ({"rank": None}, "rank is None"),
        ({"prompt_length": -1}, "prompt_length is -1"),
        ({"max_source_length": 10**9}, "max_source_length is 1000000000"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"base_model_name_or_path": "google-t5/t5-base"}, "was trained on google-t5/t5-base"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_files_of_peft_are_checked(
    language_folders: dict[str, Path],
    tmp_path: Path,
    make_backbone: Callable[..., Backbone],
    change: dict[str, Any],
    message: str,
) -> None:
    trained(AutoModelForSeq2SeqLM.from_pretrained(language_folders["t5"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        from_peft(tmp_path, make_backbone("t5", None), task="rte")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        from_peft(tmp_path, make_backbone("t5", None), task="rte")


def test_our_loader_points_at_pefts_files(load: Load, tmp_path: Path) -> None:
    get_peft_model(load(), config()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="from_peft"):
        Adapter.load(tmp_path)


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


# Starting a prompt.


def started(load: Load, **changes: Any) -> Tensor:
    layer = get_peft_model(load(), config(**changes)).get_base_model().get_encoder()
    prompt: Tensor = layer.dept_prompt["default"].soft_prompt.detach()
    return prompt


def words(model: PreTrainedModel, ids: Tensor) -> Tensor:
    embedded: Tensor = model.get_encoder().get_input_embeddings()(ids).detach()
    return embedded


def test_prompt_starts_from_words(load: Load, folder: Path) -> None:
    from transformers import AutoTokenizer

    table = words(load(), torch.arange(VOCABULARY))
    first, second = started(load), started(load)
    assert all((row == table).all(dim=1).any() for row in (*first, *second))
    assert not torch.equal(first, second)
    ids = AutoTokenizer.from_pretrained(folder)(
        TEXT_PROMPT["prompt_init_text"], add_special_tokens=False, return_tensors="pt"
    ).input_ids[0, :M]
    from_text = started(load, **TEXT_PROMPT, tokenizer_name_or_path=str(folder))
    assert torch.equal(from_text, words(load(), ids))
    assert not any((row == table).all(dim=1).any() for row in started(load, prompt_init="random"))


def test_a_loaded_adapter_needs_no_tokenizer(load: Load, text: Text, folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(), config(**TEXT_PROMPT, tokenizer_name_or_path=str(folder))).eval()
    model.peft_config["default"].tokenizer_name_or_path = "nowhere/to-be-found"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path), text), logits(model, text))


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_length": -1}, "prompt_length is a whole number of 0 to"),
        ({"rank": True}, "rank is a whole number"),
        ({"max_source_length": 0}, "max_source_length is a whole number of 1 to"),
        ({"prompt_length": 0, "rank": 0}, "nothing to train"),
        ({"rank": None, "prompt_length": 101}, "over the budget of reference_prompt_length=100"),
        ({"alpha": float("nan")}, "alpha is a finite number"),
        ({"prompt_init": "zeros"}, "prompt_init is one of"),
        ({"prompt_init": "text"}, "needs prompt_init_text and tokenizer_name_or_path"),
        ({"target_modules": ["q", "v"]}, "leave target_modules out"),
        ({"task_type": "TRANSLATION"}, "Invalid task type"),
    ],
)
def test_configuration_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "CLIPModel"])
def test_models_that_write_no_answer_are_refused_untouched(
    language_folders: dict[str, Path], vision_folders: dict[str, Path], kind: str
) -> None:
    import transformers

    folder = (language_folders | vision_folders)["t5" if kind == "T5EncoderModel" else "clip"]
    model = getattr(transformers, kind).from_pretrained(folder)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=kind):
        get_peft_model(model, config(task_type=None))
    assert [name for name, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="Linear"):
        get_peft_model(torch.nn.Linear(2, 2), config(task_type=None))


def test_too_long_an_input_is_refused_with_both_numbers(language_folders: dict[str, Path]) -> None:
    folder = language_folders["bart"]  # has 64 positions
    model = trained(AutoModelForSeq2SeqLM.from_pretrained(folder), max_source_length=100)
    text = padded(folder, lengths=(61,))
    with pytest.raises(ValueError, match=r"64 positions and the input needs 65: 4 prompt \+ 61 text"):
        logits(model, text)
    assert logits(model, padded(folder, lengths=(60,))).isfinite().all()
    with pytest.raises(ValueError, match=r"64 positions and the input needs 65: 64 prompt \+ 1 text"):
        model.add_adapter("long", config(prompt_length=64))
    assert list(model.peft_config) == ["default"]
    short = trained(AutoModelForSeq2SeqLM.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"the text has 13 tokens and the prompt was built for .*=12"):
        logits(short, padded(folder, lengths=(13,)))


def test_a_failed_addition_leaves_the_model_as_it_was(load: Load, text: Text) -> None:
    model = trained(load())
    before = logits(model, text)
    with pytest.raises(OSError):
        model.add_adapter("x", config(**TEXT_PROMPT, tokenizer_name_or_path="nowhere/at-all"))
    assert list(model.peft_config) == ["default"]
    assert list(model.get_base_model().get_encoder().dept_prompt) == ["default"]
    assert torch.equal(logits(model, text), before)


# Two learning rates.


def test_optimizer_has_two_rates(load: Load) -> None:
    model = get_peft_model(load(), config(modules_to_save=["lm_head"]))
    optimizer = create_dept_optimizer(
        model, torch.optim.AdamW, prompt_lr=0.3, offset_lr=1e-3, lr=1e-4, weight_decay=0.02
    )
    layer = model.get_base_model().get_encoder().dept_prompt["default"]
    found = {group["name"]: (group["lr"], group["params"]) for group in optimizer.param_groups}
    assert {name: lr for name, (lr, _) in found.items()} == {"prompt": 0.3, "low_rank": 1e-3, "others": 1e-4}
    assert found["prompt"][1][0] is layer.soft_prompt
    assert [id(p) for p in found["low_rank"][1]] == [id(layer.offset_a), id(layer.offset_b)]
    everything = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert everything == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["weight_decay"] == 0.02 for group in optimizer.param_groups)
    plain = get_peft_model(load(), config(rank=0))
    assert len(create_dept_optimizer(plain, torch.optim.SGD, prompt_lr=1.0, offset_lr=0.1).param_groups) == 1


def test_optimizer_wants_a_trainable_prompt(load: Load) -> None:
    model = get_peft_model(load(), config(inference_mode=True))
    with pytest.raises(ValueError, match="no trainable prompt"):
        create_dept_optimizer(model, torch.optim.AdamW, prompt_lr=0.3, offset_lr=1e-3)
