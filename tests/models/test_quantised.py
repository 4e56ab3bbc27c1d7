"""A pretrained model in 4 or 8 bits trains a prompt as in full precision; where it cannot, one line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from zoo.vlm_parts import decoder, model_of, words

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import BackboneOptions
from dept_vl.models import quantised
from dept_vl.models.options import LoadIn
from dept_vl.models.precision import hold_frozen_in_bfloat16
from dept_vl.models.pretrained_vlm import VisionLanguageModel, open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.sharding import place_model
from dept_vl.prompts.dept import DePT

BITS: tuple[LoadIn, ...] = ("4bit", "8bit")
NEEDS_BITS = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are those that 4 bits take on a CPU: whole multiples of 32."""
    tokens, path = words("<s> $A"), tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 4}
    model_of("llama", AutoModelForCausalLM, **decoder("llama", tokens, **sizes)).save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def opened(folder: Path, load_in: LoadIn = "") -> VisionLanguageModel:
    backbone = open_backbone(model=folder, load_in=load_in)
    assert isinstance(backbone, VisionLanguageModel)
    return backbone.eval()


def prompted(backbone: VisionLanguageModel) -> PromptedModel:
    torch.manual_seed(0)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=12)
    torch.nn.init.normal_(prompt.offset_b, std=0.1)  # type: ignore[arg-type]
    return PromptedModel(backbone, prompt).eval()


def loss_of(model: PromptedModel) -> torch.Tensor:
    source = model.backbone.processor(["what is red", "how many"], [[], []], [12, 12])  # type: ignore[misc]
    loss: torch.Tensor = model(
        source["input_ids"], source["attention_mask"], torch.tensor([[40, 50, 1]] * 2)
    ).loss
    return loss


@NEEDS_BITS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_prompt_gets_the_gradients_of_the_weights_that_the_bits_stand_for(
    folder: Path, bits: LoadIn, bfloat16: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    whole, few = (prompted(opened(folder, load_in)) for load_in in ("", bits))
    few.backbone.probe(0)
    with torch.no_grad():
        for name, layer in few.backbone.language.named_modules():
            if type(layer).__name__ == "Linear4bit":
                meant = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                assert not torch.equal(meant, whole.backbone.language.get_submodule(name).weight)
                whole.backbone.language.get_submodule(name).weight.copy_(meant)
    before = {name: t.clone() for name, t in few.backbone.language.state_dict().items()}
    if bfloat16:
        for model in (whole, few):
            hold_frozen_in_bfloat16(model.backbone.language)
    for model in (whole, few):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss_of(model).backward()  # type: ignore[no-untyped-call]
    for (name, one), (_, other) in zip(
        whole.prompt.named_parameters(), few.prompt.named_parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.dtype == torch.float32
        alike = torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)
        # 8 bits round activations too.
        assert alike > {"4bit": 0.99, "8bit": 0.9}[bits], name
    weights = {name: t for name, t in few.backbone.language.state_dict().items() if not bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


@NEEDS_BITS
def test_an_adapter_says_in_what_it_was_trained_and_fits_the_base_in_another_precision(
    folder: Path, tmp_path: Path
) -> None:
    whole, few = opened(folder), opened(folder, "4bit")
    Adapter.of(prompted(few), task="", metrics={}).save(tmp_path / "few")
    Adapter.of(prompted(whole), task="", metrics={}).save(tmp_path / "whole")
    of_few, of_whole = Adapter.load(tmp_path / "few"), Adapter.load(tmp_path / "whole")
    assert of_few.backbone["load_in"] == "4bit"
    assert "load_in" not in of_whole.backbone
    assert torch.equal(loss_of(of_few.build(few).eval()), loss_of(prompted(few)))
    for adapter, base in ((of_few, whole), (of_whole, few)):
        with pytest.warns(UserWarning, match="4bit"):
            built = adapter.build(base).eval()
        assert torch.equal(loss_of(built), loss_of(prompted(base)))
    other = opened(folder)
    with torch.no_grad():
        other.language_model.word_embeddings.weight.add_(0.1)
    with pytest.raises(ValueError, match="does not fit"):
        of_few.build(other)


def test_what_cannot_be_is_refused_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--load_in 8bit needs bitsandbytes"):
        open_backbone(model=folder, load_in="8bit")
    with pytest.raises(UsageError, match="--train_backbone"):
        BackboneOptions(model=str(folder), load_in="4bit", train_backbone=True, train_only="lora").loading()
    with pytest.raises(UsageError, match="--load_in is for a pretrained model"):
        BackboneOptions(backbone=folder, load_in="4bit").loading()
    with pytest.raises(UsageError, match="--device_map is for a pretrained model"):
        BackboneOptions(language=str(folder), device_map="auto").loading()
    assert "load_in" not in BackboneOptions(model=str(folder)).loading()


def test_a_model_on_several_devices_stays_there_and_needs_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = open_backbone(model=folder, device_map="auto")
    assert isinstance(backbone, VisionLanguageModel)
    assert not backbone.spread  # here all goes to one device
    assert torch.equal(loss_of(prompted(backbone.eval())), loss_of(prompted(opened(folder))))
    backbone.spread = True
    model = prompted(backbone).to("meta")
    assert {parameter.device.type for parameter in backbone.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in model.prompt.parameters()} == {"meta"}  # type: ignore[union-attr]
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(UsageError, match="--device_map auto is for one process"):
        place_model(model, accelerator)
