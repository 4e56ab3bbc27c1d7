"""Visual projection with norm, image order and object order (VL-T5, Cho et al. 2021).

There is no box embedding, because for grid features it is a constant, which the image order includes.
"""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

MAX_IMAGES = 2
OBJECT_ORDER = "object_order"
"""Name of the object order in the module and in the names of its tensors."""


class VisualProjection(nn.Module):
    """Projection of visual features to visual tokens: norm(linear(features)) + image order + object order.

    The image order has one vector per image, the object order one vector per place in an image.

    Args:
        d_vision: Hidden size of the visual features.
        d_model: Hidden size of the language model.
        norm: Norm of the kind that the language model uses: RMSNorm for T5, LayerNorm for BART.
        places: Number of visual tokens per image; 0 for no object order.
        std: Standard deviation of the initial object order.
    """

    def __init__(
        self, d_vision: int, d_model: int, norm: nn.Module, places: int = 0, std: float = 1.0
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(d_vision, d_model)
        self.norm = norm
        self.image_order = nn.Embedding(MAX_IMAGES, d_model)
        nn.init.normal_(self.linear.weight, std=d_vision**-0.5)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.image_order.weight)
        self.object_order: nn.Embedding | None = None
        if places:
            self.object_order = nn.Embedding(places, d_model)
            nn.init.normal_(self.object_order.weight, std=std)

    def forward(
        self, features: Float[Tensor, "batch images tokens d_vision"]
    ) -> Float[Tensor, "batch images*tokens d_model"]:
        """Return the visual tokens of each example, with those of its images concatenated."""
        order = self.image_order.weight[: features.shape[1], None]
        if self.object_order is not None:
            order = order + self.object_order.weight
        # Features from files may be in half precision. The norm is in full precision, as in T5.
        linear: Tensor = self.linear(features.to(self.linear.weight.dtype))
        tokens: Tensor = self.norm(linear.float()) + order
        return tokens.flatten(1, 2)


def new_projection(
    language: PreTrainedModel, d_vision: int, places: int, word_size: float = 1.0
) -> VisualProjection:
    """Return a new projection with the language model's kind of norm and scale of new word embeddings.

    Args:
        language: Language model that reads the visual tokens.
        d_vision: Hidden size of the visual features.
        places: Number of visual tokens per image; 0 for no object order.
        word_size: Root mean square of the word embeddings, which is the initial size of visual tokens in a
            decoder-only model. In GPT-2 and Llama it is far below 1, and layers hardly change larger tokens.
    """
    width: int = language.get_input_embeddings().embedding_dim
    config = language.config
    if config.is_encoder_decoder:
        eps: float | None = getattr(config, "layer_norm_epsilon", None)
        # The published vectors are rows added to the vocabulary: N(0, 1) in T5, 0.02 in BART.
        std: float = getattr(config, "init_std", getattr(config, "initializer_factor", 1.0))
    else:
        eps, std = getattr(config, "rms_norm_eps", None), word_size
    norm = nn.LayerNorm(width) if eps is None else nn.RMSNorm(width, eps=eps)
    if not config.is_encoder_decoder:
        nn.init.constant_(norm.weight, word_size)
    return VisualProjection(d_vision, width, norm, places, std)


def embedding_norm(language: PreTrainedModel) -> nn.Module | None:
    """Return the norm that the encoder applies to its input embeddings, as in BART; None if it has none."""
    if not language.config.is_encoder_decoder:
        return None
    norm: nn.Module | None = getattr(language.get_encoder(), "layernorm_embedding", None)
    return None if isinstance(norm, nn.Identity) else norm
