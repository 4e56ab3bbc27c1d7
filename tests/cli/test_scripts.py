import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.vision import VisionEncoder
from pretraining.batches import CELL_CLASSES, MOST, DrawnBatches, Sample, phrases
from pretraining.convert import convert
from pretraining.language import FORK, Course, build_language, build_tokenizer, fit_projection
from pretraining.measure import encode_scenes, exact_match
from pretraining.questions import FAMILIES, PHRASINGS, ask
from scripts import pretrain_tiny
from study_data.questions import NOUNS, QA
from study_data.render import COLOURS, SHAPES, SIZES, sample_scene

DATA = Path(__file__).parents[2] / "data"
TINY = pretrain_tiny.PretrainConfig(
    vision_steps=2,
    vision_batch=4,
    scenes=12,
    language_steps=3,
    language_batch=6,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    evaluation_scenes=6,
)


@cache
def tokenizer_built() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def pretrain(config: pretrain_tiny.PretrainConfig, *, own_tokenizer: bool = False) -> None:
    """Run the script; a model that has learnt next to nothing ends no answer, and most time went there.

    Every run builds the same tokenizer, twice; they share one unless told.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretraining.measure.LONGEST_ANSWER", 4)
        patch.setattr("pretraining.language.WATCHED_SCENES", 10)
        patch.setattr("pretraining.language.FITTED_SCENES", 100)
        if not own_tokenizer:
            for module in ("pretraining.language", "scripts.pretrain_tiny"):
                patch.setattr(f"{module}.build_tokenizer", lambda: copy.deepcopy(tokenizer_built()))
        pretrain_tiny.main(config)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    pretrain(replace(TINY, output_dir=folder))
    return folder


def test_pretraining_writes_a_backbone_that_loads_like_any_other(pretrained: Path) -> None:
    backbone = Backbone.from_pretrained(pretrained)
    assert backbone.d_model == TINY.d_model
    assert backbone.vision is not None
    assert (backbone.vision.token_count, backbone.vision.d_vision) == (16, 128)
    record = json.loads((pretrained / "pretraining.json").read_text())
    assert {"config", "minutes", "vision_accuracy", "exact_match"} <= record.keys()
    assert {"exists", "kept out: is there", "kept out: many or few"} <= record["exact_match"].keys()


def test_pretraining_is_seeded(pretrained: Path, tmp_path: Path) -> None:
    pretrain(replace(TINY, output_dir=tmp_path / "again"), own_tokenizer=True)
    first, second = (Backbone.from_pretrained(f).state_dict() for f in (pretrained, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_processes_share_a_step(tmp_path: Path) -> None:
    config = replace(TINY, output_dir=tmp_path / "tiny", processes=2, language_steps=2, bf16=False)
    pretrain(config)
    record = json.loads((tmp_path / "tiny" / "pretraining.json").read_text())
    assert record["config"]["language_steps"] == 2

    heads = torch.nn.Linear(4, 3)
    course = Course(config, torch.nn.Linear(2, 4), heads, [], torch.empty(0))

    def find(place: int) -> None:
        for parameter in course.parameters[:-1]:  # the last has no gradient
            parameter.grad = torch.full_like(parameter, 1.0 + 2 * place)
        course.average(place)

    other = FORK.Process(target=find, args=(1,))
    other.start()
    find(0)
    other.join()
    assert all((p.grad == 2).all() for p in course.parameters[:-1])
    assert (course.parameters[-1].grad == 0).all()


def test_pretraining_goes_on_after_a_finished_first_stage(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half-done"
    shutil.copytree(pretrained / "vision", folder / "vision")
    shutil.copy(pretrained / "pretraining.json", folder)
    vision = (folder / "vision" / "model.safetensors").read_bytes()
    pretrain(replace(TINY, output_dir=folder))
    assert (folder / "vision" / "model.safetensors").read_bytes() == vision
    first, second = (Backbone.from_pretrained(f).state_dict() for f in (pretrained, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["tiny-clip-t5", "tiny-clip-bart"])
def test_the_card_of_a_shipped_backbone_is_that_of_its_record(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / name, tmp_path / name)
    record = json.loads((folder / "pretraining.json").read_text())
    pretrain_tiny.write_card(folder, record)
    assert (folder / "README.md").read_text() == (DATA / name / "README.md").read_text()


@pytest.mark.parametrize("name", ["tiny-clip-t5", pytest.param("tiny-clip-bart", marks=pytest.mark.slow)])
def test_a_shipped_backbone_scores_what_its_record_says(name: str) -> None:
    backbone, rng = Backbone.from_pretrained(DATA / name), Random(99)
    scenes = [sample_scene(rng) for _ in range(300)]
    samples: dict[str, list[Sample]] = {"place": [], "neighbour": [], "relation": [], "exists": []}
    for row, scene in enumerate(scenes):
        for family, asked in samples.items():
            fact = FAMILIES[family][0](scene, rng)
            if fact is not None:
                text = rng.choice(PHRASINGS[family]).format(*fact.slots)
                asked.append(Sample(QA(text, fact.answer), (row,)))
    features = encode_scenes(backbone, scenes, 0)
    record = json.loads((DATA / name / "pretraining.json").read_text())["exact_match"]
    for family, asked in samples.items():
        # Three standard errors, of both.
        off = 3 * math.sqrt(record[family] * (1 - record[family]) * 2 / len(asked)) + 0.01
        assert exact_match(PromptedModel(backbone), asked, features) == pytest.approx(record[family], abs=off)


def test_pretraining_overwrites_nothing(pretrained: Path) -> None:
    with pytest.raises(FileExistsError, match="output_dir"):
        pretrain(replace(TINY, output_dir=pretrained))


def test_measuring_again_gives_the_record_again(pretrained: Path) -> None:
    before = (pretrained / "pretraining.json").read_text()
    pretrain(replace(TINY, output_dir=pretrained, evaluate_only=True))
    assert (pretrained / "pretraining.json").read_text() == before


def test_every_word_of_the_scenes_is_one_token(pretrained: Path) -> None:
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    text = "is there not a teal rectangle present in the image?"
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.split()) + 1
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_phrases_are_taught_what_they_refer_to(pretrained: Path) -> None:
    rng = Random(3)
    scenes = [sample_scene(rng) for _ in range(200)]
    batch = [Sample(ask(scene, rng), (row,)) for row, scene in enumerate(scenes)]
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    taught = phrases(tokenizer, batch, scenes)
    names = list(CELL_CLASSES)
    for (place, token), (count, *classes), (*centre, _) in zip(*taught.values(), strict=True):
        text = batch[place].qa.source_text
        words = tokenizer.decode(tokenizer(text).input_ids[: token + 1]).split()
        assert words[-1].removesuffix("s") in {*SHAPES, *NOUNS, "cros"}
        said = {"shape": words[-1].removesuffix("s")} if words[-1].removesuffix("s") not in NOUNS else {}
        for word in words[-3:-1]:
            said |= {"colour": word} if word in COLOURS else {"size": word} if word in SIZES else {}
        if said.get("shape") == "cros":
            said["shape"] = "cross"
        found = [o for o in scenes[place].objects if all(getattr(o, k) == v for k, v in said.items())]
        assert count == min(len(found), MOST), text
        if count == 1:
            expected = [CELL_CLASSES[name].index(getattr(found[0], name)) for name in names]
            assert list(classes[:3]) == expected
            assert centre == pytest.approx([found[0].x / 16, found[0].y / 16])
        else:
            assert set(classes) == {-100}
            assert np.isnan(centre).all()


def test_phrases_that_are_compared_are_taught_which_and_how_far(pretrained: Path) -> None:
    rng = Random(3)
    scenes = [sample_scene(rng) for _ in range(200)]
    scenes = [scene for scene in scenes if len(scene.objects) > 1]
    asked = [
        Sample(ask(scene, rng, ("relation", "further", "more")), (row,)) for row, scene in enumerate(scenes)
    ]
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    told = Counter[str]()
    for row, sample in enumerate(asked):
        taught = phrases(tokenizer, [replace(sample, rows=(0,))], [scenes[row]])
        _, _, _, _, place, wins = taught["classes"].T
        reach, text = taught["places"][:, 2], sample.qa.source_text
        if "more" in text or "outnumber" in text or "name the object" in text:  # three phrases
            assert np.isnan(reach).all()
            assert set(place) | set(wins) == {-100}
            continue
        assert place.tolist() == [0, 1]
        assert wins.tolist() == [reach[0] > reach[1], reach[1] > reach[0]]
        assert abs(reach[0] - reach[1]) >= 0.5  # cells: half of 16 pixels
        if sample.qa.target_text in ("yes", "no"):
            assert sample.qa.target_text == ("yes" if wins[0] else "no"), text
        else:
            _, shape, colour, *_ = taught["classes"][wins.argmax()]
            named = f"{CELL_CLASSES['colour'][colour]} {CELL_CLASSES['shape'][shape]}"
            assert sample.qa.target_text == named, text
        told[sample.qa.target_text] += 1
    assert min(told["yes"], told["no"], told.total() - told["yes"] - told["no"]) > 10


def test_a_family_that_fits_every_scene_is_asked_for(pretrained: Path) -> None:
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    with pytest.raises(ValueError, match="more"):
        DrawnBatches([sample_scene(Random(0))], tokenizer, 0, 8, spatial_share=1.0, spatial=("relation",))


def test_questions_about_places_are_of_the_families_named_and_about_several_objects(pretrained: Path) -> None:
    scenes = [sample_scene(Random(seed)) for seed in range(100)]
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    drawn = DrawnBatches(scenes, tokenizer, 0, 8, spatial_share=1.0, spatial=("relation", "more"))
    samples = [drawn.question(0, Random(seed)) for seed in range(200)]
    assert {sample.qa.target_text for sample in samples} == {"yes", "no"}
    assert {len(scenes[sample.rows[0]].objects) for sample in samples} == {2, 3, 4}


def test_a_projection_fitted_to_another_tower_gives_the_tokens_it_gave(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretraining.language.FITTED_SCENES", 200)
    earlier = Backbone.from_pretrained(pretrained)
    pretrain(replace(TINY, vision_only=True, output_dir=tmp_path / "tower", seed=1))
    vision = VisionEncoder.from_pretrained(tmp_path / "tower" / "vision")
    scenes = [sample_scene(Random(seed)) for seed in range(50)]

    def error(tower: VisionEncoder, fit: bool) -> float:
        torch.manual_seed(0)
        backbone = Backbone(tower, earlier.language, earlier.tokenizer, name="new", object_order="trained")
        if fit:
            fit_projection(backbone, earlier, TINY)
        new, old = (
            b.visual_projection.linear(encode_scenes(b, scenes, 0).float()) for b in (backbone, earlier)
        )
        return (new - old).square().mean().item() / old.var().item()

    assert error(earlier.vision, fit=True) == 0
    assert error(vision, fit=True) < 0.3 < 1 < error(vision, fit=False)


def test_pretraining_goes_on_from_a_finished_backbone(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    pretrain(replace(TINY, output_dir=folder, vision_from=pretrained, language_from=pretrained))
    first, second = (json.loads((f / "pretraining.json").read_text()) for f in (pretrained, folder))
    assert second["earlier"] == [{"config": first["config"], "minutes": first["minutes"]}]
    assert str(pretrained) in (folder / "README.md").read_text()


def test_a_bart_of_the_weights_of_a_t5_computes_nearly_what_it_does(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t5 = Backbone.from_pretrained(pretrained)
    for block in (t5.language.encoder.block[0], t5.language.decoder.block[0]):
        # BART has no such positions; without its own the two may be compared.
        torch.nn.init.zeros_(block.layer[0].SelfAttention.relative_attention_bias.weight)
    monkeypatch.setattr("pretraining.convert.POSITIONS", 0.0)
    torch.manual_seed(0)
    language = build_language(replace(TINY, language="bart"))
    bart = Backbone(t5.vision, language, t5.tokenizer, name="bart", object_order="trained")
    scenes = [sample_scene(Random(seed)) for seed in range(20)]
    features = encode_scenes(t5, scenes, 0)[:, 0].float()
    text = t5.tokenizer(["what is drawn here?"] * 20, return_tensors="pt")
    labels = torch.tensor([[5, 9, 1]] * 20)

    def likeness() -> float:
        with torch.no_grad():
            states = [
                PromptedModel(b)
                .eval()(**text, labels=labels, visual_features=features[:, None])
                .logits.flatten()
                for b in (t5, bart)
            ]
        return torch.corrcoef(torch.stack(states))[0, 1].item()

    assert likeness() < 0.5
    convert(t5, bart)
    assert likeness() > 0.95
