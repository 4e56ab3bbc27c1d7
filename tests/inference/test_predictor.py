"""Questions of one's own: answered as in evaluation, whatever an image comes as; and what is refused."""

import copy
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image
from PIL import Image
from runs import forget_checksums, reset_accelerate
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig

import dept_vl
from dept_vl import cli
from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import as_path
from dept_vl.config import DataOptions, RunConfig
from dept_vl.inference.loading import load
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predict import predict
from dept_vl.inference.predictor import Predictor
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.tasks import TASKS, load_task
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

QUESTION = "what colour is the circle?"


def save(backbone: Backbone, folder: Path, task: str = "vqav2", m: int = 3, s: int = 16) -> Adapter:
    """A trained adapter of this task, saved."""
    prompt = DePT(backbone.d_model, prompt_length=m, rank=2, max_source_length=s)
    model = PromptedModel(backbone.with_projection(backbone.visual_projection), prompt)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    adapter = Adapter.of(model, task=task, metrics={})
    adapter.save(folder)
    return adapter


@pytest.fixture
def predictor(t5: Backbone, tmp_path: Path) -> Predictor:
    save(t5, tmp_path / "vqa")
    return dept_vl.load(tmp_path / "vqa", backbone=t5)


@pytest.fixture
def picture() -> Image.Image:
    return random_image((40, 36), 5)


@pytest.mark.parametrize(
    ("name", "split", "changes"),
    [("vqav2", "val", {"candidate_floor": 1, "num_beams": 2}), ("nlvr2", "dev", {}), ("gqa", "val", {})],
)
def test_the_answers_are_those_of_the_evaluation(
    scenes: Path,
    make_run: Callable[..., RunConfig],
    tmp_path: Path,
    name: str,
    split: str,
    changes: dict[str, Any],
) -> None:
    """Of a run's folder, by the run's own decoding, backbone and cut."""
    data = DataOptions(
        name, scenes / name, dev_split=split, test_split=split, dev_limit=4, features="live", **changes
    )
    config = make_run(data)
    result = run(replace(config, output_dir=tmp_path / "run"))
    task = load_task(name, scenes / name, split)
    examples = [task[index] for index in range(len(task))]
    written = task.prediction_format.read(next((tmp_path / "run").glob("predictions.*")))
    reset_accelerate()
    for source in (tmp_path / "run", tmp_path / "run" / "best"):
        predictor = load(source, device="cpu")
        assert predictor.decoding.num_beams == changes.get("num_beams", 1)
        assert bool(predictor.decoding.candidates) == (name != "gqa")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # questions that are cut
            answers = predictor.answer([e.images for e in examples], [e.question for e in examples])
        assert answers == [written[e.example_id] for e in examples]
    assert result.scores


def test_an_image_may_come_as_anything(predictor: Predictor, picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    answers = [predictor.answer(image, QUESTION) for image in (picture, path, str(path), path.read_bytes())]
    assert isinstance(answers[0], str)
    assert answers == [answers[0]] * 4
    assert predictor.answer(Image.new("RGB", (8, 8)), QUESTION) != answers[0]


def test_one_goes_with_many_and_is_encoded_once(predictor: Predictor, picture: Image.Image) -> None:
    encoded, with_gradients = [], []
    vision = predictor.model.backbone.vision
    assert vision is not None
    vision.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    vision.register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    questions = [QUESTION, "how many circles?", "is it red?"]
    answers = predictor.answer(picture, questions)
    assert encoded == [1]
    assert with_gradients == [False]
    assert answers == [predictor.answer(picture, question) for question in questions]
    assert predictor.answer(picture, questions, batch_size=2) == answers
    other = random_image((36, 36), 6)
    encoded.clear()
    pictures = [picture, other, picture]
    answers = predictor.answer(pictures, QUESTION)
    assert encoded == [2]
    assert answers == [predictor.answer(one, QUESTION) for one in pictures]
    assert answers == predictor.answer(pictures, [QUESTION] * 3)
    assert predictor.answer([picture], QUESTION) == answers[:1]
    with pytest.raises(ValueError, match="as many of each, or one for all; found 2 images and 3 questions"):
        predictor.answer([picture, other], questions)
    with pytest.raises(ValueError, match="found 1 images and 0 questions"):
        predictor.answer(picture, [])


def test_pairs_are_of_one_question(backbone: Backbone, tmp_path: Path) -> None:
    save(backbone, tmp_path, "nlvr2")
    predictor = load(tmp_path, backbone=backbone)
    left, right = (random_image((32, 32), seed) for seed in range(2))
    answer = predictor.answer([left, right], "both are red")
    assert answer in ("true", "false")
    assert predictor.answer([(left, right)], ["both are red"]) == [answer]
    assert predictor.answer((left, right), ["both are red", "one is red"])[0] == answer  # type: ignore[index]
    with pytest.raises(ValueError, match="images of nlvr2: expected 2 for each question, found 1"):
        predictor.answer(left, "both are red")


def test_a_caption_needs_no_question(backbone: Backbone, picture: Image.Image, tmp_path: Path) -> None:
    save(backbone, tmp_path, "coco")
    predictor = load(tmp_path, backbone=backbone)
    assert predictor.decoding.num_beams == 5
    assert isinstance(predictor.answer(picture), str)
    with pytest.raises(ValueError, match="a caption answers no question"):
        predictor.answer(picture, QUESTION)


@pytest.mark.parametrize("language", ["t5", "bart", "gpt2", "llama"])
def test_texts_are_answered_without_images(
    make_backbone: Callable[..., Backbone], picture: Image.Image, tmp_path: Path, language: str
) -> None:
    backbone = make_backbone(language, None)
    save(backbone, tmp_path, "sst2", s=40)
    predictor = load(tmp_path, backbone=backbone)
    answer = predictor.answer(None, "red circles")
    assert answer in ("negative", "positive")
    assert predictor.answer("red circles") == predictor.answer(question="red circles") == answer
    assert predictor.answer(["red circles", "sst2 sentence: red  circles"]) == [answer, answer]
    with pytest.raises(ValueError, match="images of sst2: expected no image, found 1"):
        predictor.answer(picture, "red circles")


def test_a_text_of_several_columns_is_written_as_its_template() -> None:
    mnli = TASKS["mnli"]
    text = "mnli hypothesis: it is red premise: it is not"
    assert mnli.source(f"  {text} ") == text
    with pytest.raises(
        ValueError, match=r"mnli reads 'mnli hypothesis: \{hypothesis\} premise: \{premise\}'"
    ):
        mnli.source("it is red")
    with pytest.raises(ValueError, match=r"unknown task 'mnlj'.*closest: mnli"):
        TASKS["mnlj"]


def test_adapters_share_a_backbone_and_leave_it(
    backbone: Backbone, picture: Image.Image, tmp_path: Path
) -> None:
    """Each has a visual projection of its own."""
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    save(backbone, tmp_path / "one")
    first = load(tmp_path / "one", backbone=backbone)
    answer = first.answer(picture, QUESTION)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.visual_projection.parameters():  # type: ignore[union-attr]
            parameter.normal_()
    save(other, tmp_path / "two")
    second = load(tmp_path / "two", backbone=backbone)
    projections = [p.model.backbone.visual_projection.state_dict() for p in (first, second)]  # type: ignore[union-attr]
    assert not torch.equal(projections[0]["linear.weight"], projections[1]["linear.weight"])
    second.answer(picture, QUESTION)
    assert first.answer(picture, QUESTION) == answer
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_backbone_is_found_by_the_adapters_word(
    language_folders: dict[str, Path], vision_folders: dict[str, Path], picture: Image.Image, tmp_path: Path
) -> None:
    """What it reads of the image encoder included."""
    folders = {"vision": vision_folders["clip"], "language": language_folders["t5"]}
    backbone = Backbone.from_pretrained(**folders, vision_layer=-2, class_token=True)
    adapter = save(backbone, tmp_path / "adapter")
    assert adapter.backbone["vision"] == {"layer": -2, "class_token": True, "pooled_grid": 0}
    expected = load(tmp_path / "adapter", backbone=backbone.eval()).answer(picture, QUESTION)
    found = load(tmp_path / "adapter", device="cpu")
    assert found.model.backbone.fingerprint == backbone.fingerprint
    assert found.answer(picture, QUESTION) == expected
    backbone.save_pretrained(tmp_path / "backbone")
    for told in (tmp_path / "backbone", f"{folders['vision']}+{folders['language']}"):
        assert load(tmp_path / "adapter", backbone=told, device="cpu").answer(picture, QUESTION) == expected
    with pytest.raises(ValueError, match=r"vision \{'layer': -2.*does not fit.*vision \{'layer': -1"):
        load(tmp_path / "adapter", backbone=Backbone.from_pretrained(**folders))


def described(folder: Path, **backbone: Any) -> None:
    """Change what an adapter says of its backbone."""
    path = folder / "adapter.json"
    content = json.loads(path.read_text())
    content["backbone"] |= backbone
    path.write_text(json.dumps(content))
    forget_checksums(folder)


def test_an_older_adapter_does_not_say_what_it_reads_of_the_tower(t5: Backbone, tmp_path: Path) -> None:
    save(t5, tmp_path)
    path = tmp_path / "adapter.json"
    content = json.loads(path.read_text())
    del content["backbone"]["vision"]
    path.write_text(json.dumps(content))
    forget_checksums(tmp_path)
    assert load(tmp_path, backbone=t5).adapter.backbone["vision"] is None  # type: ignore[union-attr]


def test_a_backbone_that_moved_is_asked_for(t5: Backbone, tmp_path: Path) -> None:
    save(t5, tmp_path)
    for name in ("tiny", "/old/place/clip+/old/place/t5"):
        described(tmp_path, name=name)
        with pytest.raises(FileNotFoundError) as refused:
            load(tmp_path)
        assert f"backbone of this adapter ({name}) cannot be loaded" in str(refused.value)
        assert "--backbone" in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load(tmp_path / "nowhere")


def test_an_adapter_of_another_base_is_refused(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    t5, bart = make_backbone("t5"), make_backbone("bart")
    save(t5, tmp_path)
    with pytest.raises(ValueError, match="does not fit") as refused:
        load(tmp_path, backbone=bart)
    assert str(t5.fingerprint) in str(refused.value)
    assert str(bart.fingerprint) in str(refused.value)
    described(tmp_path, fingerprint={"class": "Blip2ForConditionalGeneration", "all": "", "embeddings": ""})
    with pytest.raises(ValueError, match=r"ready-made Blip2ForConditionalGeneration.*Attached\.load"):
        load(tmp_path)


def test_an_architecture_that_is_not_supported_is_refused(
    t5: Backbone, language_folders: dict[str, Path], vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    save(t5, tmp_path / "adapter")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "frobnicator"}')
    ViTConfig().save_pretrained(tmp_path / "vit")
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    clip, language = vision_folders["clip"], language_folders["t5"]
    for told, supported in (
        (f"{clip}+{tmp_path / 'new'}", "T5, FLAN-T5, mT5, UMT5, LongT5, BART"),
        (f"{clip}+{tmp_path / 'vit'}", "T5, FLAN-T5, mT5, UMT5, LongT5, BART"),
        (f"{tmp_path / 'new'}+{language}", "CLIP, SigLIP, DINOv2"),
        (f"{tmp_path / 'bert'}+{language}", "CLIP, SigLIP, DINOv2"),
    ):
        with pytest.raises(ValueError, match="upported are") as refused:
            load(tmp_path / "adapter", backbone=told)
        assert supported in str(refused.value)


def test_a_prompt_longer_than_the_positions_is_refused(bart: Backbone, tmp_path: Path) -> None:
    save(bart, tmp_path, m=50)
    with pytest.raises(
        ValueError, match=r"has 64 positions and the input needs 67: 50 prompt \+ 1 text \+ 16"
    ):
        load(tmp_path, backbone=bart)


def test_an_unreadable_image_is_refused(predictor: Predictor, picture: Image.Image, tmp_path: Path) -> None:
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    (tmp_path / "half.png").write_bytes(half)
    for broken in (tmp_path / "half.png", half, Image.open(io.BytesIO(half)), b"", b"no image", tmp_path):
        with pytest.raises(ValueError, match="is not a readable image"):
            predictor.answer(broken, QUESTION)
    with pytest.raises(ValueError, match=r"image 2 of 3: what was given \(8 bytes\) is not a readable image"):
        predictor.answer([picture, b"no image", picture.rotate(90)], QUESTION)
    with pytest.raises(FileNotFoundError, match=r"no image at nowhere\.png"):
        predictor.answer("nowhere.png", QUESTION)


def test_questions_are_neither_empty_nor_cut_in_silence(predictor: Predictor, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="this one is empty"):
        predictor.answer(picture, ["what?", " "])
    with pytest.raises(ValueError, match=r"'\\ud800'"):  # half of a surrogate pair
        predictor.answer(picture, ["what?", "what \ud800?"])
    with pytest.warns(UserWarning, match=r"is cut to 16.*max_source_length"):
        answer = predictor.answer(
            picture, "is the circle red or blue or green or yellow or purple ? yes or no"
        )
    assert isinstance(answer, str)
    with pytest.warns(UserWarning, match="'</s>'.*special tokens"):
        predictor.answer(picture, "is </s> red?")


def test_the_task_is_asked_for_where_the_adapter_does_not_say_one(
    t5: Backbone, picture: Image.Image, tmp_path: Path
) -> None:
    save(t5, tmp_path / "two", "vqav2+gqa")
    with pytest.raises(ValueError, match="several tasks: say task='vqav2' or 'gqa'"):
        load(tmp_path / "two", backbone=t5)
    assert load(tmp_path / "two", backbone=t5, task="gqa").task.name == "gqa"
    save(t5, tmp_path / "own", "mine")
    with pytest.raises(ValueError, match=r"'mine' is not a task of this package.*vqav2, gqa"):
        load(tmp_path / "own", backbone=t5)
    assert load(tmp_path / "own", backbone=t5, task="vqav2").answer(picture, QUESTION)


@pytest.mark.parametrize("source", [None, 5, b"runs/vqa", ["runs/vqa"]])
def test_what_is_no_folder_and_no_name_is_refused(source: Any) -> None:
    with pytest.raises(UsageError):
        as_path(source)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cpu:1", "cuda:99", "xpu"])
def test_a_device_that_is_not_here_is_refused(t5: Backbone, tmp_path: Path, device: str) -> None:
    save(t5, tmp_path)
    with pytest.raises(UsageError):
        load(tmp_path, device=device)


def test_a_task_of_images_needs_a_tower(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    text = make_backbone("t5", None)
    save(text, tmp_path)
    with pytest.raises(ValueError, match=r"vqav2 asks about images, and .* has no vision tower"):
        load(tmp_path, backbone=text)


def test_the_script_prints_an_answer_a_line(
    predictor: Predictor,
    picture: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictor.model.backbone.save_pretrained(tmp_path / "backbone")
    path = tmp_path / "picture.png"
    picture.save(path)
    questions = (QUESTION, "is it red?")

    def asked_of(*inputs: str) -> PredictConfig:
        return PredictConfig(inputs, str(tmp_path / "vqa"), backbone=tmp_path / "backbone", device="cpu")

    answers = predict(asked_of(str(path), *questions))
    assert answers == predictor.answer(picture, questions)
    assert capsys.readouterr().out.splitlines() == answers
    with pytest.raises(ValueError, match='vqav2 needs IMAGE "QUESTION"; got'):
        predict(asked_of(str(path)))
    for second in (str(path), "blue-circle.PNG"):
        with pytest.raises(UsageError, match="vqav2 takes 1 image, got 2"):
            predict(asked_of(str(path), second, QUESTION))
    assert len(predict(asked_of(str(path), "what is in photo.png"))) == 1
    capsys.readouterr()
    long = "is it a very long question that goes on " * 3
    assert (
        cli.main(
            [
                "predict",
                str(path),
                long,
                "--adapter",
                str(tmp_path / "vqa"),
                "--backbone",
                str(tmp_path / "backbone"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    note = capsys.readouterr().err
    assert (note[:6], "is cut to 16" in note, note.count("\n"), ".py" in note) == ("note: ", True, 1, False)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"split": "test"}, "--split"),
        ({"output": Path("x.jsonl")}, "--output"),
        ({"own": OwnOptions(images=Path("photos"))}, "--images"),
        ({"num_workers": 1, "batch_size": 2}, "--batch_size, --num_workers"),
        ({"features": "live", "on_bad_image": "skip"}, "--features, --on_bad_image"),
    ],
)
def test_options_of_tables_need_a_table(changed: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: only for tables"):
        predict(PredictConfig(("a.png", "q"), "nowhere", **changed))
