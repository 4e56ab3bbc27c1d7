"""What a prompt in a pretrained model comes to, written out for one row without padding.

Placeholder tokens stand behind the start token, or in front of everything where there is none, and one hook
on the word embeddings puts P in their places and adds the offset to the text of the source. Independent of
the package.
"""

import re
from typing import Any

import torch
from torch import Tensor
from zoo.vlm_parts import has_encoder

ORDINARY = 40
"""A token of a byte."""
OF_IMAGES = re.compile("image|img|vision", re.IGNORECASE)
"""In the names of the tokens of an image and of those that fence it in."""


def reference_logits(
    model: Any, tokenizer: Any, row: dict[str, Tensor], prompt: Tensor, offset: Tensor, answer: list[int]
) -> Tensor:
    """Scores of each token of an answer to a row; of `row` nothing is padding."""
    ids = row["input_ids"][0].tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    of_image = [place for place, name in enumerate(names) if OF_IMAGES.search(name)]
    image = range(min(of_image, default=0), max(of_image, default=-1) + 1)
    text = [place for place in range(len(ids)) if place not in image]
    start = int(not has_encoder(model) and ids[0] == tokenizer.bos_token_id)
    length = len(prompt)

    def with_prompt(tokens: Tensor, value: int) -> Tensor:
        return torch.cat([tokens[:, :start], tokens.new_full((1, length), value), tokens[:, start:]], dim=1)

    inputs = {name: with_prompt(t, 0) if name.endswith("token_type_ids") else t for name, t in row.items()}
    source = inputs["input_ids"] = with_prompt(row["input_ids"], ORDINARY)
    if has_encoder(model):
        inputs["labels"] = torch.tensor([answer])
    else:
        inputs["input_ids"] = torch.cat([source, torch.tensor([answer])], dim=1)
        for name in [name for name in inputs if name.endswith("token_type_ids")]:
            kind = int(model.config.model_type == "paligemma")  # its answer alone is read from left to right
            behind = inputs[name].new_full((1, len(answer)), kind)
            inputs[name] = torch.cat([inputs[name], behind], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen = []

    def put(module: Any, given: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if seen or embedded.shape[:2] != inputs["input_ids"].shape:
            return embedded
        seen.append(True)
        embedded = embedded.clone()
        embedded[:, start : start + length] = prompt
        for number, place in enumerate(text):
            embedded[:, place + length * (place >= start)] += offset[number]
        return embedded

    hook = model.get_input_embeddings().register_forward_hook(put)
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    hook.remove()
    return logits if has_encoder(model) else logits[-len(answer) - 1 : -1]
