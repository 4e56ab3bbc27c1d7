"""Convert a T5 to a BART that computes nearly the same, to continue training.

T5 normalises the input of each sublayer, BART its output. With the measured scale of the hidden states at
every norm, T5's weights can be rewritten for BART, except T5's positions, which BART has to learn.
"""

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from pretraining.batches import DrawnBatches
from pretraining.measure import encode_scenes, tensors
from study_data.render import sample_scene

SCENES, QUESTIONS = 200, 200
"""Numbers of scenes and questions to measure the scales on."""
POSITIONS = 0.5
"""Standard deviation of BART's position embeddings relative to that of the word embeddings."""


@torch.no_grad()
def convert(t5: Backbone, bart: Backbone) -> None:
    """Copy a T5's weights to a BART with the same sizes, tower and tokenizer."""
    old, new = t5.language, bart.language
    scales = measured(t5)
    table = old.get_input_embeddings().weight
    words = new.get_input_embeddings()
    # BART multiplies input embeddings by the root of the hidden size; T5 divides its logits by it.
    words.weight.copy_(table / table.shape[1] ** 0.5)
    for side in ("encoder", "decoder"):
        source, target = getattr(old, side), getattr(new.model, side)
        target.embed_positions.weight.mul_(POSITIONS * table.std() * 2**0.5)
        for block, layer in zip(source.block, target.layers, strict=True):
            crossed = (
                [("EncDecAttention", layer.encoder_attn, layer.encoder_attn_layer_norm)]
                if side == "decoder"
                else []
            )
            attentions = [("SelfAttention", layer.self_attn, layer.self_attn_layer_norm), *crossed]
            for part, (name, attention, _) in zip(block.layer, attentions, strict=False):
                # T5 does not normalise the encoder's states again.
                read = part.layer_norm.weight
                memory = torch.ones_like(read) if name == "EncDecAttention" else read
                given = getattr(part, name)
                attention.q_proj.weight.copy_(given.q.weight * read * attention.head_dim**0.5)
                attention.k_proj.weight.copy_(given.k.weight * memory)
                attention.v_proj.weight.copy_(given.v.weight * memory)
                attention.out_proj.weight.copy_(given.o.weight / scales[part.layer_norm])
            last = block.layer[-1]
            layer.fc1.weight.copy_(last.DenseReluDense.wi.weight * last.layer_norm.weight)
            layer.fc2.weight.copy_(last.DenseReluDense.wo.weight / scales[last.layer_norm])
        target.layers[-1].final_layer_norm.weight.copy_(source.final_layer_norm.weight)
    projection, given = bart.visual_projection, t5.visual_projection
    assert projection is not None
    assert given is not None
    projection.load_state_dict(given.state_dict(), strict=False)
    # The first norm scales the words to 1, but not the visual tokens.
    scale = scales["visual"]
    for weight in (projection.norm.weight, projection.image_order.weight, projection.object_order.weight):
        weight.div_(scale)


@torch.no_grad()
def measured(backbone: Backbone) -> dict[Any, Tensor]:
    """Return the root mean square of the input of each norm of a T5, and of the visual tokens."""
    found: dict[Any, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[module] = inputs[0].float().square().mean().sqrt()

    rng = Random(0)
    scenes = [sample_scene(rng) for _ in range(SCENES)]
    features = encode_scenes(backbone, scenes, 0)
    model = PromptedModel(backbone).eval()
    drawn = DrawnBatches(scenes, backbone.tokenizer, 0, QUESTIONS)
    batch = next(batch for batch in drawn if batch["rows"].shape[1:] == (1,))
    arguments = {k: v for k, v in tensors(batch, features).items() if k not in ("ends", "classes", "places")}
    hooks = [
        m.register_forward_pre_hook(note)
        for n, m in backbone.language.named_modules()
        if n.endswith("layer_norm")
    ]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    visual = backbone.project(visual_features=arguments["visual_features"])
    assert visual is not None
    return found | {"visual": visual.square().mean().sqrt()}
