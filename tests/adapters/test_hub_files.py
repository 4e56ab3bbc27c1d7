"""Adapters from folders and from a Hub, and back: a real client, and a server that keeps all in memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image, random_text
from hub_server import READER, WRITER, FakeHub, Repository, running
from huggingface_hub import ModelCard, constants

from dept_vl import load
from dept_vl.adapters.adapter import ADAPTER_FILE, TENSORS_FILE, Adapter
from dept_vl.config import BackboneOptions, DataOptions, OptimOptions, RunConfig, read_config, to_json
from dept_vl.models.backbone import Backbone
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

NAME = "someone/adapter"


@pytest.fixture
def adapter(t5: Backbone) -> Adapter:
    torch.manual_seed(0)
    prompt = DePT(t5.d_model, prompt_length=4, rank=3, max_source_length=12)
    torch.nn.init.normal_(prompt.offset_b)  # type: ignore[arg-type]
    return Adapter.of(PromptedModel(t5, prompt), task="vqav2", metrics={"overall": 61.5})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that this process takes for the only one, and an empty cache."""
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield server


def contents(adapter: Adapter, folder: Path) -> dict[str, bytes]:
    adapter.save(folder)
    return {name: (folder / name).read_bytes() for name in (ADAPTER_FILE, TENSORS_FILE)}


def held(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    """The files of the repository on a branch."""
    repository = hub.repositories[NAME]
    return repository.commits[repository.branches[branch]]


def put(hub: FakeHub, files: dict[str, bytes], **options: bool) -> None:
    hub.repositories[NAME] = Repository(**options)
    hub.repositories[NAME].commit("main", files)


def test_a_folder_is_read_as_it_is(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "mine")
    for where in (tmp_path / "mine", str(tmp_path / "mine")):
        loaded = Adapter.from_pretrained(where)
        assert all(torch.equal(loaded.tensors[name], adapter.tensors[name]) for name in adapter.tensors)


def test_of_a_run_the_best_adapter_is_read(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "run" / "best")
    replace(adapter, task="another").save(tmp_path / "run" / "last")
    assert Adapter.from_pretrained(tmp_path / "run").task == "vqav2"
    assert Adapter.from_pretrained(tmp_path / "run" / "last").task == "another"


def test_a_folder_that_is_there_goes_before_a_repository(hub: FakeHub, adapter: Adapter) -> None:
    put(hub, contents(replace(adapter, task="on the Hub"), Path("upload")))
    assert Adapter.from_pretrained(NAME).task == "on the Hub"
    adapter.save(NAME)
    asked = len(hub.requests)
    assert Adapter.from_pretrained(NAME).task == "vqav2"
    assert len(hub.requests) == asked


def test_a_folder_has_no_revision(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match="revision='v1' was asked of"):
        Adapter.from_pretrained(tmp_path, revision="v1")


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "./adapter", "/adapter", "some one/x", Path("a/b")])
def test_what_is_neither_folder_nor_name(hub: FakeHub, name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder, and a repository of the Hub is named like"):
        Adapter.from_pretrained(name)
    assert not hub.requests


def test_round_trip_at_two_revisions(
    hub: FakeHub, adapter: Adapter, make_backbone: Callable[..., Backbone]
) -> None:
    """Bytes on the Hub are those of the files; each revision gives its own, and both answer as before."""
    other = replace(adapter, tensors={name: 2 * tensor for name, tensor in adapter.tensors.items()})
    address = adapter.push_to_hub(NAME, token=WRITER)
    assert address == f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    other.push_to_hub(NAME, revision="doubled", token=WRITER)
    first = hub.repositories[NAME].branches["main"]
    for revision, pushed in ((None, adapter), ("main", adapter), (first, adapter), ("doubled", other)):
        expected = contents(pushed, Path(f"saved-{revision}"))
        branch = "doubled" if revision == "doubled" else "main"
        assert {name: held(hub, branch)[name] for name in expected} == expected
        loaded = Adapter.from_pretrained(NAME, revision=revision)
        assert contents(loaded, Path(f"loaded-{revision}")) == expected
        built, before = (one.build(make_backbone("t5")).eval() for one in (loaded, pushed))
        text = random_text(built.backbone)
        assert torch.equal(
            built.generate(**text, max_new_tokens=5), before.generate(**text, max_new_tokens=5)
        )


def test_a_push_is_one_commit_of_three_files(hub: FakeHub, adapter: Adapter) -> None:
    adapter.push_to_hub(NAME, token=WRITER)
    repository = hub.repositories[NAME]
    assert len(repository.commits) == 2  # the repository's first, and this
    assert held(hub).keys() == {".gitattributes", ADAPTER_FILE, TENSORS_FILE, "README.md"}
    replace(adapter, metrics={"overall": 62.0}).push_to_hub(NAME, token=WRITER)
    assert Adapter.from_pretrained(NAME).metrics == {"overall": 62.0}


def test_what_else_a_repository_holds_is_not_fetched(hub: FakeHub, adapter: Adapter) -> None:
    put(hub, contents(adapter, Path("upload")) | {"model.safetensors": b"large", "README.md": b"long"})
    Adapter.from_pretrained(NAME)
    assert {path.name for path in Path("cache").rglob("snapshots/*/*")} == {ADAPTER_FILE, TENSORS_FILE}


def test_a_private_repository_needs_a_token(hub: FakeHub, adapter: Adapter) -> None:
    adapter.push_to_hub(NAME, private=True, token=WRITER)
    assert hub.repositories[NAME].private
    with pytest.raises(FileNotFoundError, match="if it is private, log in"):
        Adapter.from_pretrained(NAME)
    assert Adapter.from_pretrained(NAME, token=READER).task == "vqav2"


def test_a_gated_repository(hub: FakeHub, adapter: Adapter) -> None:
    put(hub, contents(adapter, Path("upload")), gated=True)
    with pytest.raises(PermissionError, match=f"{NAME} is gated: ask for access"):
        Adapter.from_pretrained(NAME)
    assert Adapter.from_pretrained(NAME, token=READER).task == "vqav2"


@pytest.mark.parametrize("token", [None, READER])
def test_a_repository_that_is_not_there(hub: FakeHub, token: str | None) -> None:
    with pytest.raises(FileNotFoundError, match=f"no adapter at {NAME}: there is no such folder here"):
        Adapter.from_pretrained(NAME, token=token)


def test_a_revision_that_is_not_there(hub: FakeHub, adapter: Adapter) -> None:
    adapter.push_to_hub(NAME, token=WRITER)
    with pytest.raises(FileNotFoundError, match=f"{NAME} has no revision v9"):
        Adapter.from_pretrained(NAME, revision="v9")


@pytest.mark.parametrize("missing", [ADAPTER_FILE, TENSORS_FILE])
def test_a_repository_without_an_adapter(hub: FakeHub, adapter: Adapter, missing: str) -> None:
    files = contents(adapter, Path("upload"))
    del files[missing]
    put(hub, files)
    with pytest.raises(FileNotFoundError, match=f"no adapter of dept_vl in {NAME} on the Hub: {missing}"):
        Adapter.from_pretrained(NAME)


def test_a_repository_of_pefts(hub: FakeHub) -> None:
    put(hub, {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    with pytest.raises(FileNotFoundError, match="its files are PEFT's"):
        Adapter.from_pretrained(NAME)


def test_a_damaged_download_is_refused(hub: FakeHub, adapter: Adapter) -> None:
    files = contents(adapter, Path("upload"))
    put(hub, files | {TENSORS_FILE: files[TENSORS_FILE][:-8]})
    with pytest.raises(ValueError, match="is damaged"):
        Adapter.from_pretrained(NAME)


def test_without_a_network_the_cache_answers(
    hub: FakeHub, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.push_to_hub(NAME, token=WRITER)
    adapter.push_to_hub(NAME, token=WRITER, revision="v2")
    Adapter.from_pretrained(NAME)
    for change in ({"HF_HUB_OFFLINE": True}, {"HF_HUB_OFFLINE": False, "ENDPOINT": "http://127.0.0.1:9"}):
        for name, value in change.items():
            monkeypatch.setattr(constants, name, value)
        assert Adapter.from_pretrained(NAME).task == "vqav2"
        with pytest.raises(
            FileNotFoundError, match=f"{NAME} \\(revision v2\\) is not a folder here, is not in"
        ):
            Adapter.from_pretrained(NAME, revision="v2")
        with pytest.raises(FileNotFoundError, match="and the Hub cannot be reached"):
            Adapter.from_pretrained("someone/else")


@pytest.mark.parametrize("token", [None, READER])
def test_who_may_not_write(hub: FakeHub, adapter: Adapter, token: str | None) -> None:
    with pytest.raises(PermissionError, match=f"{NAME} cannot be written with this token"):
        adapter.push_to_hub(NAME, token=token)
    assert not hub.repositories


def test_a_push_while_the_hub_is_switched_off(adapter: Adapter) -> None:
    with pytest.raises(ConnectionError, match="nothing was uploaded to someone/adapter: HF_HUB_OFFLINE"):
        adapter.push_to_hub(NAME, token=WRITER)


@pytest.mark.slow
def test_the_environment_chooses_hub_and_token(adapter: Adapter, tmp_path: Path) -> None:
    """A program of its own, told of the server as users tell of a mirror."""
    adapter.save(tmp_path / "mine")
    program = (
        "from dept_vl import Adapter\n"
        f"Adapter.from_pretrained({str(tmp_path / 'mine')!r}).push_to_hub({NAME!r})\n"
        f"Adapter.from_pretrained({NAME!r}, revision='main').save({str(tmp_path / 'back')!r})\n"
    )
    with running() as hub:
        told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | told | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=tmp_path)
    for name in (ADAPTER_FILE, TENSORS_FILE):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_the_options_of_a_run_go_along(hub: FakeHub, adapter: Adapter) -> None:
    run = Path("run")
    adapter.save(run / "best")
    data = DataOptions(task="vqav2", data_dir=Path("/home/someone/vqa"), dev_split="minival")
    config = RunConfig(data=data, optim=OptimOptions(prompt_lr=0.25), output_dir=Path("/home/someone/a"))
    (run / "config.json").write_text(json.dumps(to_json(config)))
    Adapter.from_pretrained(run).push_to_hub(NAME, run=run, token=WRITER)
    assert b"/home/someone" not in b"".join(held(hub).values())
    Path("training.json").write_bytes(held(hub)["training.json"])
    there = read_config(Path("training.json"))  # as by the command on the card
    assert there == replace(config, data=replace(data, data_dir=None), output_dir=None)
    with pytest.raises(ValueError, match="trained on gqa, and the run at run on vqav2"):
        replace(adapter, task="gqa").push_to_hub(NAME, run=run, token=WRITER)
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="expected a JSON file at"):
        adapter.push_to_hub(NAME, run=run, token=WRITER)


def test_the_card_goes_along(hub: FakeHub, adapter: Adapter) -> None:
    adapter.push_to_hub(NAME, token=WRITER, datasets=["someone/data"])
    data = ModelCard(held(hub)["README.md"].decode()).data
    assert data.datasets == ["someone/data"]
    assert data.pipeline_tag == "visual-question-answering"


@pytest.mark.parametrize(
    ("family", "text_form"),
    [("qwen2_5_vl", ""), ("blip2", "{text} ?"), ("llama_text", "")],
)
def test_a_pretrained_model_s_adapter(
    hub: FakeHub, pretrained_folder: Callable[[str], Path], family: str, text_form: str
) -> None:
    """The card says how the model is asked, and what is fetched answers the same."""
    folder, images = pretrained_folder(family), family != "llama_text"
    task = "vqav2" if images else "sst2"
    backbone = open_backbone(model=folder, text_form=text_form).eval()
    torch.manual_seed(0)
    prompt = DePT(backbone.d_model, prompt_length=4, rank=3, max_source_length=40)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    adapter = Adapter.of(PromptedModel(backbone, prompt), task=task, metrics={})
    adapter.save("run/best")
    options = BackboneOptions(model=str(folder), text_form=text_form)
    config = RunConfig(data=DataOptions(task=task), backbone=options)
    Path("run/config.json").write_text(json.dumps(to_json(config)))
    adapter.push_to_hub(NAME, run="run", token=WRITER)
    names = {ADAPTER_FILE, TENSORS_FILE, "README.md", "training.json"}
    assert held(hub).keys() == {".gitattributes", *names}
    assert str(folder).encode() not in held(hub)["training.json"]  # a folder of this machine
    card = ModelCard(held(hub)["README.md"].decode())
    expected = {True: "visual-question-answering", False: "text-classification"}
    assert card.data.pipeline_tag == expected[images]
    assert f'dept_vl.load("{NAME}")' in card.text
    assert f"`{folder}`" in card.text
    assert ("`text_form`: `{text} ?`" in card.text) == bool(text_form)
    pushed = Adapter.from_pretrained(NAME)
    assert contents(pushed, Path("back")) == contents(adapter, Path("mine"))
    asked = ([random_image((24, 20), 1)] if images else None, ["what is red"])
    assert load(NAME).answer(*asked) == load("run").answer(*asked)
    built, before = (one.build(backbone).eval() for one in (pushed, adapter))
    source = backbone.processor(["what is red"], [asked[0] or []], [40])  # type: ignore[misc]
    given = {name: source.pop(name) for name in ("input_ids", "attention_mask")}
    given |= {"processed": source, "labels": torch.tensor([[40, 50, 1]])}
    with torch.no_grad():
        logits = built(**given).logits
        assert torch.equal(logits, before(**given).logits)
        assert not torch.equal(logits, PromptedModel(backbone).eval()(**given).logits)


def test_the_code_on_the_card_loads_a_pretrained_model_of_no_known_task(
    hub: FakeHub, pretrained_folder: Callable[[str], Path]
) -> None:
    backbone = open_backbone(model=pretrained_folder("blip2"), text_form="ask: {text}").eval()
    prompt = DePT(backbone.d_model, prompt_length=4, rank=3, max_source_length=40)
    Adapter.of(PromptedModel(backbone, prompt), task="", metrics={}).push_to_hub(NAME, token=WRITER)
    card = held(hub)["README.md"].decode()
    made: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], made)
    assert torch.equal(made["model"].prompt.soft_prompt, prompt.soft_prompt)
    assert made["backbone"].text_form == "ask: {text}"
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text"
