"""A prompt and a backbone: the one model behind every task, with images or without."""

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
    """Reads `[prompt ; text ; visual]`, in the encoder where there is one, and answers.

    Args:
        backbone: Frozen but for what `Backbone.freeze` leaves trainable.
        prompt: The trainable prompt; None runs the bare backbone.
        backbone_dropout: Keep the frozen language model's dropout on while training.

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
        """This model for inference: P is one tensor, and a token offset is in a word table of its own.

        The backbone is shared, and not changed. A prompt with nothing to fold gives this model itself.
        """
        if self.prompt is None or (self.prompt.source is None and self.prompt.token_offset is None):
            return self
        if self.backbone.processor is not None:  # its word embeddings are those of image tokens too
            return self
        words = self.backbone.language_model.word_embeddings.weight
        table = self.backbone.embed(torch.arange(len(words), device=words.device)[None])[0]
        prompt, table = fold(self.prompt, table)
        model = PromptedModel(self.backbone, prompt, backbone_dropout=self.backbone_dropout)
        if self.prompt.token_offset is not None:
            model.word_table = nn.Embedding(len(table), table.shape[1], _weight=table, _freeze=True)
        return model.train(self.training)

    def train(self, mode: bool = True) -> "PromptedModel":
        """Training mode, with the frozen backbone's dropout as asked for."""
        super().train(mode)
        self.backbone.train(mode and self.backbone_dropout)
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by learning rate: prompt, low_rank, visual_projection, backbone."""
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
        """The source as the language model answers it, and its mask; `forward` and `generate` both use it.

        Args:
            input_ids: Text tokens, padded on either side; those of a pretrained model's images too.
            attention_mask: Non-zero on tokens.
            pixel_values: Of a composed backbone: preprocessed images, or
            visual_features: what the vision tower gave for them; neither for text alone.
            processed: Of a pretrained model: what else its processor made of the source.
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
        pixel_values: Float[Tensor, "batch images 3 height width"] | None = None,
        visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None,
        processed: Mapping[str, Tensor] | None = None,
        weights: Float[Tensor, " batch"] | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits and the loss: each example's mean token cross-entropy, weighted, averaged.

        Args:
            input_ids: See `encode`, as for the mask, pixels and features.
            attention_mask: Non-zero on text tokens.
            labels: Target tokens, `IGNORE_INDEX` on the padding behind them.
            pixel_values: See `encode`.
            visual_features: See `encode`.
            processed: See `encode`.
            weights: An example's share of the loss (VQA: the soft score of the sampled answer).
        """
        encoded, mask = self.encode(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            visual_features=visual_features,
            processed=processed,
        )
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
        """Decode by the language model's own `generate` (greedy, beam, sampling).

        Args:
            input_ids: See `encode`, as for the mask, pixels and features.
            attention_mask: Non-zero on text tokens.
            pixel_values: See `encode`.
            visual_features: See `encode`.
            processed: See `encode`.
            **options: Of `transformers.GenerationMixin.generate`: `num_beams`, `max_new_tokens`,
                `do_sample`, `num_return_sequences`, ...

        Returns:
            New tokens, behind the decoder's start token where there is one.
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
    """Mean over examples of weight x mean token cross-entropy (VL-T5, Cho et al. 2021)."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(labels)
    counted = labels != IGNORE_INDEX
    per_example = losses.sum(1) / counted.sum(1).clamp(min=1)
    return (per_example if weights is None else per_example * weights).mean()
