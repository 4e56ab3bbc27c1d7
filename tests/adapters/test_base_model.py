"""The base of an adapter, as `attach` and PEFT's plugin compare it: precision, vocabulary, offloading."""

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import VOCABULARY
from runs import forget_checksums
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from zoo.ready_made import FAMILIES, inputs_of, ready_made

from dept_vl._utils.tensors import fingerprint
from dept_vl.adapters.attach import Attached, attach, new_prompt
from dept_vl.adapters.base_model import describe_base

pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import LoraConfig, PeftModel, get_peft_model

from dept_vl.adapters.peft.plugin import DeptConfig

SIZES = {"prompt_length": 3, "rank": 2, "max_source_length": 7}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
TEXT = {
    "input_ids": torch.tensor([[9, 8, 7], [9, 2, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([[3, 4, 5], [3, 6, 5]]),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


def made(family: str) -> PreTrainedModel:
    """The same model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ready_made(family)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()


def config(**changes: Any) -> DeptConfig:
    options = {"task_type": "SEQ_2_SEQ_LM", "init_weights": False, **SIZES, **changes}
    return DeptConfig(**options)


def trained(model: PreTrainedModel) -> Attached:
    prompt = new_prompt(model, **SIZES)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return attach(model, prompt)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    labels = {} if "labels" in inputs else {"labels": torch.arange(8, 24).view(4, 4)}
    out: Tensor = model(**inputs, **labels).logits
    return out


@contextmanager
def no_word() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*adapter")
        yield


def merged_lora(model: PreTrainedModel, targets: list[str]) -> PreTrainedModel:
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        merged: PreTrainedModel = get_peft_model(model, lora).merge_and_unload()
    return merged


# -- precision


def test_every_precision_takes_adapters_of_every_other(family: str, tmp_path: Path) -> None:
    accepted = []
    for saved, loaded in PAIRS:
        trained(made(family).to(saved)).save(tmp_path)
        with no_word():
            accepted.append(Attached.load(tmp_path, made(family).to(loaded)))
    assert len(accepted) == 9


def test_every_precision_takes_pefts_adapters_of_every_other(folder: Path, tmp_path: Path) -> None:
    for saved in DTYPES:
        get_peft_model(load(folder, saved), config()).save_pretrained(tmp_path / str(saved))
    accepted = []
    for saved, loaded in PAIRS:
        with no_word():
            accepted.append(PeftModel.from_pretrained(load(folder, loaded), tmp_path / str(saved)))
    assert len(accepted) == 9


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_another_base_is_another_in_every_precision(
    folder: Path, tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
) -> None:
    trained(made("blip2").to(saved)).save(tmp_path)
    get_peft_model(load(folder, saved), config()).save_pretrained(tmp_path / "peft")
    blip2, language = made("blip2"), load(folder)
    with torch.no_grad():
        for model in (blip2, language.get_encoder()):
            model.get_input_embeddings().weight[5] += 0.1
    with pytest.raises(ValueError, match="another base"):
        Attached.load(tmp_path, blip2.to(loaded))
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(language.to(loaded), tmp_path / "peft")


# -- other weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_with_a_merged_lora_and_the_plain_one_are_told_apart(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    targets = ["q", "v"] if folder.name == "t5" else ["q_proj", "v_proj"]
    get_peft_model(merged_lora(load(folder), targets), config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="same word embeddings, but other weights"):
        PeftModel.from_pretrained(load(folder, dtype), tmp_path)
    with pytest.warns(UserWarning, match="same word embeddings, but other weights"):
        PeftModel.from_pretrained(load(folder, dtype), tmp_path, is_trainable=True)
    with no_word():
        PeftModel.from_pretrained(merged_lora(load(folder), targets), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attach_tells_them_apart_as_well(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    trained(merged_lora(made("blip2"), ["q", "v"])).save(tmp_path)
    with pytest.warns(UserWarning, match="same word embeddings, but other weights"):
        Attached.load(tmp_path, made("blip2").to(dtype))


def test_what_peft_adds_to_a_base_is_none_of_it(folder: Path, tmp_path: Path) -> None:
    """Prompts, trained copies of modules, and trained tokens are no part of the base."""
    plain = load(folder)
    expected = describe_base(plain)
    for extra in (
        {},
        {"modules_to_save": ["lm_head", "decoder.embed_tokens"]},
        {"trainable_token_indices": {"decoder.embed_tokens": [4, 5]}},
    ):
        model = get_peft_model(load(folder), config(**extra))
        assert describe_base(model.get_base_model()) == expected
        model.add_adapter("second", config())
        assert model.peft_config["second"].base_fingerprint == expected


# -- the vocabulary


def test_rows_that_resizing_makes_are_no_other_base(folder: Path, tmp_path: Path) -> None:
    """transformers draws them near the mean of the others, so that some are the same where sampled."""

    def resized(seed: int) -> PreTrainedModel:
        base = load(folder)
        torch.manual_seed(seed)
        base.resize_token_embeddings(VOCABULARY + 5)
        words = base.get_encoder().get_input_embeddings().weight
        with torch.no_grad():
            words[-5:-1] = words[:-5].mean(0)
            words[-1] = torch.randn(words.shape[1])
        return base

    get_peft_model(resized(0), config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="last word embeddings, after row"):
        PeftModel.from_pretrained(resized(3), tmp_path)


@pytest.mark.parametrize("more", [28, -4])
def test_a_base_of_another_vocabulary_size_is_compared_by_the_rows_that_both_have(
    folder: Path, tmp_path: Path, more: int
) -> None:
    model = get_peft_model(load(folder), config()).eval()
    model.save_pretrained(tmp_path)
    other = load(folder)
    other.resize_token_embeddings(VOCABULARY + more)
    with pytest.warns(
        UserWarning, match=rf"{VOCABULARY + more} word embeddings .* {VOCABULARY}; those"
    ) as told:
        loaded = PeftModel.from_pretrained(other, tmp_path)
    assert not any("other weights" in str(one.message) for one in told)
    both = min(VOCABULARY, VOCABULARY + more)
    torch.testing.assert_close(logits(loaded, TEXT)[..., :both], logits(model, TEXT)[..., :both])
    with torch.no_grad():
        other.get_encoder().get_input_embeddings().weight[5] += 1.0
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(loaded.unload(), tmp_path)


@pytest.mark.parametrize("more", [28, -4])
def test_attach_compares_the_rows_that_both_have(tmp_path: Path, more: int) -> None:
    attached, inputs = trained(made("blip2")), inputs_of("blip2")
    attached.save(tmp_path)
    other = made("blip2")
    other.resize_token_embeddings(VOCABULARY + more)
    with pytest.warns(UserWarning, match=rf"{VOCABULARY + more} word embeddings .* {VOCABULARY}; those"):
        loaded = Attached.load(tmp_path, other)
    both = min(VOCABULARY, VOCABULARY + more)
    torch.testing.assert_close(logits(loaded, inputs)[..., :both], logits(attached, inputs)[..., :both])
    loaded.detach()
    with torch.no_grad():
        other.get_input_embeddings().weight[5] += 1.0
    with pytest.raises(ValueError, match="another base"):
        Attached.load(tmp_path, other)


@pytest.mark.parametrize(
    "extra",
    [
        {"modules_to_save": ["decoder.embed_tokens", "lm_head"]},
        {
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": {"decoder.embed_tokens": [VOCABULARY, VOCABULARY + 1]},
        },
    ],
    ids=["modules_to_save", "trainable_token_indices"],
)
def test_trained_embeddings_of_added_tokens_come_with_the_adapter(
    folder: Path, tmp_path: Path, extra: dict[str, Any]
) -> None:
    def resized() -> PreTrainedModel:
        """With rows for two tokens that are others at every call, as resizing makes them."""
        base = load(folder)
        base.resize_token_embeddings(VOCABULARY + 2)
        with torch.no_grad():
            for module in (
                base.get_encoder().get_input_embeddings(),
                base.get_decoder().get_input_embeddings(),
            ):
                module.weight[-2:] = torch.randn(2, module.weight.shape[1])
        return base

    text = {**TEXT, "labels": torch.tensor([[VOCABULARY, 4, 5], [3, VOCABULARY + 1, 5]])}
    model = get_peft_model(resized(), config(**extra))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        model(**text).loss.backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.eval().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="last word embeddings, after row"):
        loaded = PeftModel.from_pretrained(resized(), tmp_path)
    assert torch.equal(logits(loaded, text), logits(model, text))
    assert loaded(**text).loss.item() == model(**text).loss.item()
    with torch.no_grad():
        other = resized()
        other.get_encoder().get_input_embeddings().weight[5] += 1.0
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(other, tmp_path)


# -- offloaded


@pytest.fixture(params=["cpu", "disk", "embeddings"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def to_disk(model: PreTrainedModel) -> PreTrainedModel:
        return disk_offload(model, tmp_path / "offloaded", "cpu")

    def embeddings_alone(model: PreTrainedModel) -> PreTrainedModel:
        encoder = model.get_encoder()
        for embedding in {model.get_input_embeddings(), encoder.get_input_embeddings()}:
            cpu_offload(embedding, "cpu")
        return model

    ways = {"disk": to_disk, "embeddings": embeddings_alone, "cpu": lambda model: cpu_offload(model, "cpu")}
    return ways[request.param]


def test_attach_works_on_offloaded_models(
    family: str, tmp_path: Path, offload: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    inputs = inputs_of(family)
    attached = trained(made(family))
    attached.save(tmp_path / "here")
    model = offload(made(family))
    assert model.get_input_embeddings().weight.is_meta
    with no_word():
        loaded = Attached.load(tmp_path / "here", model)
    assert {parameter.device.type for parameter in loaded.prompt.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded, inputs), logits(attached, inputs))
    options = {"max_new_tokens": 4, "num_beams": 2}
    # A model's own `generate` does not fetch weights of the whole, such as the queries of BLIP-2.
    if not any(parameter.is_meta for parameter in model.parameters(recurse=False)):
        assert torch.equal(loaded.generate(**inputs, **options), attached.generate(**inputs, **options))
    loss = [one(**inputs, labels=torch.arange(8, 24).view(4, 4)).loss for one in (loaded, attached)]
    for one in loss:
        one.backward()
    for mine, other in zip(loaded.prompt.parameters(), attached.prompt.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
    loaded.save(tmp_path / "there")
    described = [json.loads((tmp_path / where / "adapter.json").read_text()) for where in ("here", "there")]
    assert described[0]["backbone"]["fingerprint"] == described[1]["backbone"]["fingerprint"]
    start = new_prompt(model, **SIZES).soft_prompt
    assert torch.equal(start, new_prompt(attached.model, **SIZES).soft_prompt)  # type: ignore[arg-type]


def test_peft_works_on_offloaded_models(
    folder: Path, tmp_path: Path, offload: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(folder), config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    with no_word():
        loaded = PeftModel.from_pretrained(offload(load(folder)), tmp_path / "adapter")
    assert {p.device.type for name, p in loaded.named_parameters() if "dept_" in name} == {"cpu"}
    assert torch.equal(logits(loaded, TEXT), logits(model, TEXT))
    rows = {"adapter_names": ["default", "__base__"]}
    torch.testing.assert_close(logits(loaded, TEXT | rows), logits(model, TEXT | rows))


def test_embeddings_without_values_are_an_error() -> None:
    with torch.device("meta"):
        model = ready_made("blip2")
    prompt = new_prompt(made("blip2"), **SIZES)
    with pytest.raises(ValueError, match="hold no values"):
        attach(model, prompt)
    assert not any(parameter.is_meta for parameter in prompt.parameters())


# -- files of older versions, and damaged ones


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    forget_checksums(path.parent)


def older(content: dict[str, Any]) -> None:
    record = content["backbone"]["fingerprint"]
    content["backbone"]["fingerprint"] = {name: record[name] for name in ("class", "embeddings", "all")}


def test_hashes_alone_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    trained(made("blip2")).save(tmp_path)
    rewritten(tmp_path / "adapter.json", older)
    with no_word():
        Attached.load(tmp_path, made("blip2"))
    with pytest.warns(UserWarning, match="could not be compared"):
        Attached.load(tmp_path, made("blip2").half())
    other = made("blip2")
    nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="another base"):
        Attached.load(tmp_path, other)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_hash_of_rounded_embeddings_rejects_no_precision(
    tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
) -> None:
    trained(made("blip2").to(saved)).save(tmp_path)
    rewritten(tmp_path / "adapter.json", older)
    known = saved != torch.float16 or loaded != torch.bfloat16
    known &= loaded != torch.float16 or saved == torch.float16
    with no_word() if known else pytest.warns(UserWarning, match="could not be compared"):
        Attached.load(tmp_path, made("blip2").to(loaded))
    # A checkpoint in bfloat16, read in full precision, is rounded all the same.
    if loaded == torch.bfloat16 and not known:
        with pytest.warns(UserWarning, match="could not be compared"):
            Attached.load(tmp_path, made("blip2").to(loaded).float())


def test_a_hash_of_the_embeddings_alone_is_compared(folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(folder), config()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    words = load(folder).get_encoder().get_input_embeddings().weight
    hashed = fingerprint([("embeddings", words)])  # as it was written

    def older_peft(content: dict[str, Any]) -> None:
        del content["base_fingerprint"]
        content["embedding_fingerprint"] = hashed

    rewritten(path, older_peft)
    with no_word():
        PeftModel.from_pretrained(load(folder), tmp_path)
    other = load(folder)
    with torch.no_grad():
        other.get_encoder().get_input_embeddings().weight[5] += 1.0
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "%"},
        {"rows": "AAA="},
        {"rows": ""},
        {"others": "é"},
        {"vocabulary": "-1"},
        {"vocabulary": "9" * 20},
        {"vocabulary": "many"},
    ],
    ids=str,
)
def test_a_damaged_record_is_an_error(tmp_path: Path, change: dict[str, str]) -> None:
    trained(made("blip2")).save(tmp_path)
    rewritten(tmp_path / "adapter.json", lambda content: content["backbone"]["fingerprint"].update(change))
    with pytest.raises(ValueError, match="fingerprint of its base is damaged"):
        Attached.load(tmp_path, made("blip2").half())
