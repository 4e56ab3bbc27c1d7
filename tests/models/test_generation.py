"""Answers depend on our options and the ids of the model alone, whatever the checkpoint's settings are."""

import inspect
import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_text
from transformers import CompileConfig, GenerationConfig

from dept_vl.inference.decoding import generation_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.tasks.base import Decoding

ODD: dict[str, Any] = {
    "max_length": 2,
    "max_new_tokens": 1,
    "min_length": 56,
    "min_new_tokens": 30,
    "early_stopping": True,
    "max_time": 1e-6,
    "stop_strings": ["red", "a"],
    "do_sample": True,
    "num_beams": 4,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"batch_size": 1},
    "max_cache_len": 3,
    "temperature": 9.0,
    "top_k": 3,
    "top_p": 0.2,
    "min_p": 0.3,
    "top_h": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "repetition_penalty": 7.0,
    "encoder_repetition_penalty": 7.0,
    "length_penalty": -9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(3, 80)],
    "renormalize_logits": True,
    "forced_bos_token_id": 20,
    "forced_eos_token_id": 21,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [0, 9.0],
    "suppress_tokens": list(range(30, 150)),
    "begin_suppress_tokens": list(range(3, 80)),
    "sequence_bias": [[[25], 90.0]],
    "token_healing": True,
    "guidance_scale": 7.0,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 40,
    "bos_token_id": 41,
    "eos_token_id": 42,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 43,
    "is_assistant": True,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": CompileConfig(fullgraph=True),
    "disable_compile": True,
    "continuous_batching_config": None,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 1.0,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[60]],
    "prefill_chunk_size": 1,
}
"""Another value than usual for every field."""
NO_SETTING = {"transformers_version"}
NOT_IN_FILES = {"compile_config"}
WAYS = {
    "greedy": Decoding(8),
    "beams": Decoding(8, 3),
    "candidates": Decoding(8, 1, ("red", "green shapes", "two large circles", "no")),
    "ranked": Decoding(8, 4, ("red", "green shapes", "two large circles", "no")),
}


def fields() -> set[str]:
    """All settings that a file may have, of the version of transformers that runs."""
    source = inspect.getsource(GenerationConfig.__init__)
    return {name for name in vars(GenerationConfig()) if not name.startswith("_") and f'"{name}"' in source}


@pytest.fixture(scope="module")
def folders(language_folders: dict[str, Path], decoder_folders: dict[str, Path]) -> dict[str, Path]:
    return language_folders | decoder_folders


def model_of(folder: Path, **settings: Any) -> PromptedModel:
    backbone = Backbone.from_pretrained(language=folder).eval()
    for name, value in settings.items():
        setattr(backbone.language.generation_config, name, value)
    return PromptedModel(backbone).eval()


def answers(model: PromptedModel, decoding: Decoding) -> Any:
    torch.manual_seed(0)
    options = generation_options(decoding, model.backbone.tokenizer)
    return model.generate(**random_text(model.backbone, (7, 4, 5, 9)), **options)


@cache
def usual_answers(folder: Path, decoding: Decoding) -> Any:
    return answers(model_of(folder), decoding)


def changed(folder: Path, to: Path, file: str, values: dict[str, Any]) -> Path:
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


def test_every_field_has_an_odd_value() -> None:
    missing = fields() - ODD.keys() - NO_SETTING
    assert len(fields()) > 50
    assert not missing


@pytest.mark.parametrize("language", ["t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_settings_of_the_checkpoint_do_not_count(
    language: str, file: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    # In config.json ids are the model's own, and `use_cache` and what is put out are no generation's alone.
    own = {name for name in ODD if name.endswith("_token_id") and not name.startswith("forced")}
    own |= {"use_cache", "output_attentions", "output_hidden_states"}
    values = ODD if file == "generation_config.json" else {k: v for k, v in ODD.items() if k not in own}
    values = {k: v for k, v in values.items() if v is not None and k not in NOT_IN_FILES}
    odd = changed(folders[language], tmp_path / "odd", file, values)
    if file == "config.json":
        (odd / "generation_config.json").unlink()
    model = model_of(odd, **{name: ODD[name] for name in NOT_IN_FILES})
    for way, decoding in WAYS.items():
        assert torch.equal(answers(deepcopy(model), decoding), usual_answers(folders[language], decoding)), (
            way
        )


@pytest.mark.parametrize("language", ["t5", "bart", "gpt2"])
@pytest.mark.parametrize(
    "name", ["min_length", "num_beams", "return_dict_in_generate", "forced_bos_token_id", "do_sample"]
)
def test_no_single_setting_counts(language: str, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    odd = changed(folders[language], tmp_path / "odd", "generation_config.json", {name: ODD[name]})
    assert torch.equal(answers(model_of(odd), Decoding(8)), usual_answers(folders[language], Decoding(8)))


def test_settings_of_the_checkpoint_count_where_they_are_asked_for(t5: Backbone) -> None:
    model = PromptedModel(t5).eval()
    own = t5.language.generation_config
    own.update(forced_bos_token_id=20)
    given = random_text(t5)
    told = model.generate(**given, generation_config=own, max_new_tokens=3)
    assert (told[:, 1] == 20).all()
    assert not (model.generate(**given, max_new_tokens=3)[:, 1] == 20).any()
    # And they are still the model's, to be saved with it.
    assert t5.language.generation_config is own
    assert own.forced_bos_token_id == 20
