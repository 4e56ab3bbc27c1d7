"""Adapters from before the offset's parameters had their names of today."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dept_vl.adapters.adapter import TENSORS_FILE, Adapter
from dept_vl.adapters.peft.files import from_peft
from dept_vl.adapters.schema import FORMAT_VERSION
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel

OLDER = Path(__file__).parents[1] / "fixtures" / "before_offset"
LANGUAGE = OLDER / "language"
LOGITS = [1.194153, 0.832485, 0.131831, 1.382445, -0.534277]
"""What the older code computed, see the README beside the files."""
NAMES = {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.from_pretrained(language=LANGUAGE)


def logits(model: PromptedModel) -> list[float]:
    text = model.backbone.tokenizer(["a red ball"], return_tensors="pt")
    with torch.no_grad():
        found: list[float] = model.eval()(**text, labels=torch.tensor([[5, 1]])).logits[0, 0, :5].tolist()
    return found


def test_an_older_adapter_is_read_and_written_again_as_a_new_one(backbone: Backbone, tmp_path: Path) -> None:
    stored = load_file(OLDER / "adapter" / TENSORS_FILE)
    assert stored.keys() == {"prompt.soft_prompt", "prompt.lora_a", "prompt.lora_b"}
    adapter = Adapter.load(OLDER / "adapter")
    assert (adapter.tensors.keys(), adapter.format_version) == (NAMES, FORMAT_VERSION)
    assert torch.equal(adapter.tensors["prompt.offset_b"], stored["prompt.lora_b"])
    assert logits(adapter.build(backbone)) == pytest.approx(LOGITS, abs=1e-4)
    adapter.save(tmp_path)
    assert load_file(tmp_path / TENSORS_FILE).keys() == NAMES
    again = Adapter.load(tmp_path)
    assert (again.prompt, again.metrics) == (adapter.prompt, adapter.metrics)
    assert logits(again.build(backbone)) == pytest.approx(LOGITS, abs=1e-4)


def test_an_older_adapter_in_the_files_of_peft_is_read(backbone: Backbone) -> None:
    adapter = from_peft(OLDER / "peft", backbone, task="rte")
    assert adapter.tensors.keys() == NAMES
    assert logits(adapter.build(backbone)) == pytest.approx(LOGITS, abs=1e-4)


@pytest.mark.parametrize("folder", ["peft", "adapter"])
def test_peft_runs_an_older_adapter(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    import dept_vl.adapters.peft.plugin  # noqa: F401

    if folder == "adapter":  # PEFT's description with our tensors, which the plugin takes too
        (tmp_path / "adapter_config.json").write_bytes((OLDER / "peft" / "adapter_config.json").read_bytes())
        tensors = (OLDER / "adapter" / TENSORS_FILE).read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    base = AutoModelForSeq2SeqLM.from_pretrained(LANGUAGE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, OLDER / "peft" if folder == "peft" else tmp_path).eval()
    text = AutoTokenizer.from_pretrained(LANGUAGE)(["a red ball"], return_tensors="pt")
    with torch.no_grad():
        found = model(**text, labels=torch.tensor([[5, 1]])).logits[0, 0, :5].tolist()
    assert found == pytest.approx(LOGITS, abs=1e-4)
