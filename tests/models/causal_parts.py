"""Decoders with a prompt, for the tests of what they compute and of what is around it."""

import math
from pathlib import Path
from typing import Any

import torch
from conftest import D_MODEL, random_text
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX
from dept_vl.prompts.dept import DePT

M, R, S, ALPHA = 4, 3, 12, 8.0
LENGTHS, ANSWERS = (7, 4, 5), (4, 2, 3)
LAYOUTS = ["padded on the right", "padded on the left", "padded to s"]

Text = dict[str, Tensor]


class Literal:
    """The formula on a stock language model; P (m, d), A (s, r) and B (r, d) may be left out."""

    def __init__(self, language: PreTrainedModel, parts: tuple[Tensor, Tensor, Tensor] | None) -> None:
        self.language, self.parts = language, parts

    def source(self, tokens: Tensor) -> Tensor:
        embedded = self.words(tokens)
        if self.parts is None:
            return embedded
        prompt, a, b = self.parts
        offset = torch.stack([ALPHA / math.sqrt(R) * a[place] @ b for place in range(len(tokens))])
        return torch.cat([prompt, embedded + offset])

    def words(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.language.get_input_embeddings()(tokens)
        return embedded

    def logits(self, tokens: Tensor, answer: Tensor) -> Tensor:
        """Scores of each token of an answer."""
        source = self.source(tokens)
        scores = self.language(inputs_embeds=torch.cat([source, self.words(answer)])[None]).logits[0]
        return scores[len(source) - 1 : len(source) - 1 + len(answer)]

    def loss(self, tokens: Tensor, answer: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(tokens, answer), answer)

    def greedy(self, tokens: Tensor, count: int) -> list[int]:
        """The likeliest token, read with all before it from the start, and again."""
        eos, answer = self.language.config.eos_token_id, []
        while len(answer) < count and eos not in answer:
            read = torch.cat([self.source(tokens), self.words(torch.tensor(answer, dtype=torch.long))])
            answer.append(int(self.language(inputs_embeds=read[None]).logits[0, -1].argmax()))
        return answer

    def generate(self, tokens: Tensor, **options: Any) -> list[list[int]]:
        found = self.language.generate(inputs_embeds=self.source(tokens)[None], **options)
        eos = self.language.config.eos_token_id
        return [cut(row, eos) for row in found.tolist()]


def cut(tokens: list[int], eos: int) -> list[int]:
    """An answer without the padding behind its end."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def texts_of(text: Text) -> list[Tensor]:
    """Each text of a batch, without padding."""
    return [ids[mask == 1] for ids, mask in zip(text["input_ids"], text["attention_mask"], strict=True)]


def answers_of(labels: Tensor) -> list[Tensor]:
    return [row[row != IGNORE_INDEX] for row in labels]


def stock(folder: Path) -> PreTrainedModel:
    """A model that no backbone has touched."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    return model


def trained_prompt(prompt_length: int = M, rank: int = R) -> DePT:
    """A prompt as after training: no part of it is zero."""
    prompt = DePT(D_MODEL, prompt_length=prompt_length, rank=rank, max_source_length=S, alpha=ALPHA)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return prompt


def laid_out(backbone: Backbone, layout: str, lengths: tuple[int, ...] = LENGTHS) -> Text:
    """The same texts in each layout."""
    text = random_text(backbone, lengths, side="left" if layout == "padded on the left" else "right")
    if layout != "padded to s":
        return text
    missing = S - text["input_ids"].shape[1]
    return {name: nn.functional.pad(tensor, (0, missing), value=0) for name, tensor in text.items()}
