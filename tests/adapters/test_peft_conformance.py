"""What PEFT expects of every method, besides what `test_peft_plugin` shows of this one."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import alone, run_code
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from dept_vl.adapters.peft.plugin import DeptConfig, DeptLayer  # noqa: E402

SIZES = {"prompt_length": 4, "rank": 3, "max_source_length": 12}
# With a hole in a mask, and a decoder that is told its tokens rather than labels.
INPUTS = {
    "input_ids": torch.tensor([[9, 8, 7], [9, 2, 7]]),
    "decoder_input_ids": torch.tensor([[3, 4, 5], [3, 6, 5]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
}


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()


def config(**changes: Any) -> DeptConfig:
    return DeptConfig(**{"task_type": "SEQ_2_SEQ_LM", **SIZES, **changes})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(**INPUTS)[0]
    return out


def prompt_of(model: PeftModel, name: str = "default") -> Any:
    return model.get_base_model().get_encoder().dept_prompt[name]


# Configurations.


@pytest.mark.parametrize("task_type", [*TaskType, None])
def test_a_configuration_is_data(task_type: TaskType | None, tmp_path: Path) -> None:
    mine = DeptConfig(task_type=task_type, prompt_length=7)
    assert copy.copy(mine).to_dict() == copy.deepcopy(mine).to_dict() == mine.to_dict()
    assert pickle.loads(pickle.dumps(mine)).to_dict() == mine.to_dict()
    mine.save_pretrained(tmp_path)
    for kind in (DeptConfig, PeftConfig):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is DeptConfig
        assert loaded.to_dict() == mine.to_dict()
    assert DeptConfig.from_json_file(str(tmp_path / "adapter_config.json"))["prompt_length"] == 7


def test_options_of_a_later_version_are_left_out_with_a_warning(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert DeptConfig.from_pretrained(tmp_path).prompt_length == 4


def test_a_given_configuration_is_the_one_that_is_used(folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(folder), config()).save_pretrained(tmp_path)
    given = config()
    loaded = PeftModel.from_pretrained(load(folder), tmp_path, is_trainable=False, config=given)
    assert loaded.peft_config["default"] is given
    assert given.inference_mode


def test_weights_that_are_not_neutral(folder: Path, tmp_path: Path) -> None:
    """`init_weights=False`, by which PEFT's own tests make an adapter that changes something."""
    assert not prompt_of(get_peft_model(load(folder), config())).offset_b.any()
    model = get_peft_model(load(folder), config(init_weights=False, prompt_length=0)).eval()
    assert prompt_of(model).offset_b.abs().min() > 0
    assert not torch.allclose(logits(model), logits(load(folder)), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), tmp_path)), logits(model))


# Models.


def test_any_name_for_an_adapter(folder: Path) -> None:
    model = get_peft_model(load(folder), config(), adapter_name="an-adapter")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "an-adapter" in name
    }
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))


def test_what_has_the_prefix_gets_gradients_and_nothing_else(folder: Path) -> None:
    model = get_peft_model(load(folder), config())
    model(**INPUTS)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (model.prefix in name), name


def test_inputs_ask_for_gradients_where_they_are_told_to(folder: Path) -> None:
    model = get_peft_model(load(folder), config())
    assert not model.get_input_embeddings()(INPUTS["input_ids"]).requires_grad
    prepared = prepare_model_for_kbit_training(load(folder))
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    model = get_peft_model(prepared, config())
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(INPUTS["input_ids"]).requires_grad


@pytest.mark.parametrize("how", [{"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_loading_leaves_everything_on_its_device(folder: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    model = get_peft_model(load(folder), config(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path, **how)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded), logits(model))


def test_several_are_loaded_without_missing_keys(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(folder), config(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path)
    for name in ("one", "two"):
        assert loaded.load_adapter(tmp_path, adapter_name=name).missing_keys == []
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_a_deleted_adapter_is_named_nowhere(folder: Path) -> None:
    model = get_peft_model(load(folder), config(modules_to_save=["lm_head"]))
    model.add_adapter("gone", config(modules_to_save=["lm_head"]))
    model.delete_adapter("gone")  # not active
    assert model.active_adapters == ["default"]
    assert not [name for name, _ in model.named_modules() if "gone" in name]
    with pytest.raises(ValueError, match="Adapter gone does not exist"):
        model.delete_adapter("gone")
    model.delete_adapter("default")
    assert model.active_adapters == []
    model.base_model(**INPUTS)


def test_scores_of_generate_follow_the_switch(folder: Path) -> None:
    base = load(folder)

    def scores(model: Any) -> Tensor:
        out = model.generate(**INPUTS, return_dict_in_generate=True, output_scores=True, max_new_tokens=2)
        first: Tensor = out.scores[0]
        return first

    before = scores(base)
    model = get_peft_model(base, config(init_weights=False)).eval()
    switched_on = scores(model)
    assert not torch.allclose(before, switched_on, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(scores(model), before)
    assert torch.equal(scores(model), switched_on)


def test_generate_takes_names_as_with_any_encoder_decoder_in_peft(folder: Path) -> None:
    model = get_peft_model(load(folder), config())
    with pytest.raises(TypeError):
        model.generate(INPUTS["input_ids"])


def test_a_model_card_runs_without_the_plugin_imported(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, where nothing has imported the plugin yet."""
    from huggingface_hub import ModelCard

    get_peft_model(load(folder), config()).save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model) == ("peft", str(folder))
    card = (tmp_path / "README.md").read_text()
    (code,) = [part.split("```")[0] for part in card.split("```python")[1:] if "dept_vl" in part]
    code += "assert type(model.active_peft_config).__name__ == 'DeptConfig'"
    assert alone(run_code, code, tmp_path, "dept_vl.adapters.peft.plugin") == 0
    get_peft_model(load(folder), config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("## Use\n") == 1
    config().save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "README.md").exists()


# Another base.


def changed(folder: Path) -> PreTrainedModel:
    """The same model with one other word."""
    model = load(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1.0
    return model


def test_another_base_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(folder), config()).save_pretrained(tmp_path)
    other = changed(folder)
    before = logits(other)
    with pytest.raises(ValueError, match="this adapter was trained on another base"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(module, DeptLayer) for module in other.modules())
    assert torch.equal(logits(other), before)
    with pytest.warns(UserWarning, match="was trained on another base"):
        PeftModel.from_pretrained(changed(folder), tmp_path, is_trainable=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_none(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    get_peft_model(load(folder), config()).save_pretrained(tmp_path / "full")
    half = PeftModel.from_pretrained(load(folder, dtype=dtype), tmp_path / "full")
    half.save_pretrained(tmp_path / "half")
    PeftModel.from_pretrained(load(folder), tmp_path / "half")


def test_a_configuration_may_be_used_again(folder: Path, tmp_path: Path) -> None:
    mine = config()
    get_peft_model(load(folder), mine)
    with pytest.warns(UserWarning, match="configuration was trained on another base"):
        model = get_peft_model(changed(folder), mine)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(changed(folder), tmp_path)
