"""Model of a prompt and a backbone, used for every task, with or without images."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from dept_vl.models.base import FrozenBackbone
from dept_vl.models.tokens import IGNORE_INDEX
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import fold


class PromptedModel(nn.Module):
    """Backbone with a prompt, which reads `[prompt ; text ; visual]` and scores or generates answers.

    Args:
        backbone: Backbone, frozen except for the parts that `FrozenBackbone.freeze` leaves trainable.
        prompt: Trainable prompt; None for the backbone alone.
        backbone_dropout: Whether the backbone's dropout is active in training mode.

    Raises:
        ValueError: If the prompt has another hidden size, or a method that the backbone does not support.

    Example:
        >>> import dept_vl
        >>> backbone = dept_vl.Backbone.from_pretrained("data/tiny-clip-t5")
        >>> prompt = dept_vl.build_prompt("dept", backbone, prompt_length=8, rank=2)
        >>> model = dept_vl.PromptedModel(backbone, prompt).eval()
        >>> text = backbone.tokenizer(["is it day?"], return_tensors="pt")
        >>> tokens = model.generate(text.input_ids, text.attention_mask, max_new_tokens=4)
        >>> answers = backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    """

    def __init__(
        self, backbone: FrozenBackbone, prompt: DePT | None = None, *, backbone_dropout: bool = True
    ) -> None:
        super().__init__()
        if prompt is not None and prompt.d_model != backbone.d_model:
            raise ValueError(
                f"the prompt is {prompt.d_model} wide and {backbone.name} is {backbone.d_model} wide; "
                "build the prompt with the backbone's d_model"
            )
        if prompt is not None:
            backbone.check_prompt(prompt)
        self.backbone = backbone
        self.prompt = prompt
        self.backbone_dropout = backbone_dropout
        self.word_table: nn.Embedding | None = None

    @torch.no_grad()
    def folded(self) -> "PromptedModel":
        """Return a model for inference, with P as one tensor and the token offset in an embedding matrix.

        The backbone is shared and not changed. The model itself is returned if its prompt has nothing to
        fold, or if the backbone is a pretrained model.
        """
        if self.prompt is None or (self.prompt.source is None and self.prompt.token_offset is None):
            return self
        if self.backbone.processor is not None:  # its embedding matrix is also used for image tokens
            return self
        words = self.backbone.language_model.word_embeddings.weight
        table = self.backbone.embed(torch.arange(len(words), device=words.device)[None])[0]
        prompt, table = fold(self.prompt, table)
        model = PromptedModel(self.backbone, prompt, backbone_dropout=self.backbone_dropout)
        if self.prompt.token_offset is not None:
            model.word_table = nn.Embedding(len(table), table.shape[1], _weight=table, _freeze=True)
        return model.train(self.training)

    def train(self, mode: bool = True) -> "PromptedModel":
        """Set training or evaluation mode; the backbone is in training mode only with `backbone_dropout`."""
        super().train(mode)
        self.backbone.train(mode and self.backbone_dropout)
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by group: prompt, low_rank, visual_projection, backbone."""
        groups = {} if self.prompt is None else self.prompt.parameter_groups()
        projection = self.backbone.visual_projection
        if projection is not None:
            groups["visual_projection"] = list(projection.parameters())
        groups["backbone"] = list(self.backbone.language.parameters())
        trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
        return {name: group for name, group in trained.items() if group}

    def encode(
        self,
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        *,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
        processed: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, Bool[Tensor, "batch source"]]:
        """Return the encoded source and its mask; see `FrozenBackbone.read`.

        Args:
            input_ids: Token ids, padded on either side; a pretrained model's include its image tokens.
            attention_mask: Mask that is non-zero on tokens.
            pixel_values: Preprocessed images, for a composed backbone.
            visual_features: Output of the vision tower for the images, instead of `pixel_values`.
            processed: Further outputs of a pretrained model's processor for the source.
        """
        return self.backbone.read(
            self.prompt,
            input_ids,
            attention_mask,
            word_table=self.word_table,
            pixel_values=pixel_values,
            visual_features=visual_features,
            processed=processed,
        )

    def forward(
        self,
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        labels: Int[Tensor, "batch target"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        **images: Any,
    ) -> Seq2SeqLMOutput:
        """Return the logits and the loss, as computed by `sequence_loss`.

        Args:
            input_ids: Token ids of the texts.
            attention_mask: Mask that is non-zero on tokens.
            labels: Token ids of the answers, with `IGNORE_INDEX` on the padding after them.
            weights: Weight of each example in the loss (VQA: soft score of the sampled answer).
            **images: Arguments `pixel_values`, `visual_features` and `processed` of `encode`.
        """
        encoded, mask = self.encode(input_ids, attention_mask, **images)
        logits = self.backbone.language_model.logits(encoded, mask, labels)
        return Seq2SeqLMOutput(loss=sequence_loss(logits, labels, weights), logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch text"],
        attention_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        *,
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
        processed: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Int[Tensor, "sequences target"]:
        """Generate answers by the language model's own `generate` (greedy, beam search, sampling).

        Inputs are those of `encode`. `options` are those of `transformers.GenerationMixin.generate`, such as
        `num_beams`, `max_new_tokens`, `do_sample` and `num_return_sequences`.

        Returns:
            Token ids of the answers, after the decoder's start token if there is one.
        """
        encoded, mask = self.encode(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            visual_features=visual_features,
            processed=processed,
        )
        return self.backbone.language_model.generate(encoded, mask, **options)


def sequence_loss(
    logits: Float[Tensor, "batch target vocabulary"],
    labels: Int[Tensor, "batch target"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over examples of weight x mean token cross-entropy (VL-T5, Cho et al. 2021)."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(labels)
    counted = labels != IGNORE_INDEX
    per_example = losses.sum(1) / counted.sum(1).clamp(min=1)
    return (per_example if weights is None else per_example * weights).mean()
