"""DePT as a PEFT method: its files and ours, how a prompt starts, what is refused, and its optimizer."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    AutoPeftModelForSeq2SeqLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter  # noqa: E402
from plugged import (  # noqa: E402
    SIZES,
    Load,
    M,
    S,
    Text,
    close,
    config,
    generated,
    logits,
    padded,
    relative,
    several,
    trained,
)

from dept_vl.adapters.adapter import Adapter  # noqa: E402
from dept_vl.adapters.peft.files import from_peft, to_peft  # noqa: E402
from dept_vl.adapters.peft.plugin import DeptConfig, create_dept_optimizer  # noqa: E402
from dept_vl.models.backbone import Backbone  # noqa: E402
from dept_vl.models.prompted import PromptedModel  # noqa: E402
from dept_vl.prompts.dept import DePT  # noqa: E402

TEXT_PROMPT = {"prompt_init": "text", "prompt_init_text": "how many large red circles ?"}


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


@pytest.fixture
def load(folder: Path) -> Load:
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture
def text(folder: Path) -> Text:
    return padded(folder)


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
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        from_peft(tmp_path, make_backbone("t5", None), task="rte")


def test_our_loader_points_at_pefts_files(load: Load, tmp_path: Path) -> None:
    get_peft_model(load(), config()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="from_peft"):
        Adapter.load(tmp_path)


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
