"""From visual features to visual tokens: norm, image order and object order (VL-T5, Cho et al. 2021).

The published box embedding is a constant under grid features and is therefore left to the image order.
"""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

MAX_IMAGES = 2
OBJECT_ORDER = "object_order"
"""Name of the vectors of the places, in the module and in the names of its tensors."""


class VisualProjection(nn.Module):
    """LayerNorm(Linear(visual features)) + image order + object order; trained in every published row.

    The image order tells two images apart, the object order the places in an image, which two images share.

    Args:
        d_vision: Width of the visual features.
        d_model: Width of the language model.
        norm: The norm that the language model uses: RMSNorm for T5, LayerNorm for BART.
        places: Visual tokens of an image, with a vector each; 0 gives none.
        std: Of these vectors when new.
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
        """Visual tokens of all images of an example, one after the other."""
        order = self.image_order.weight[: features.shape[1], None]
        if self.object_order is not None:
            order = order + self.object_order.weight
        # Features from files may be of half precision. The norm is in full under autocast too, as T5's own.
        linear: Tensor = self.linear(features.to(self.linear.weight.dtype))
        tokens: Tensor = self.norm(linear.float()) + order
        return tokens.flatten(1, 2)


def new_projection(
    language: PreTrainedModel, d_vision: int, places: int, word_size: float = 1.0
) -> VisualProjection:
    """Make a projection with the language model's kind of norm and its spread of new word vectors.

    Args:
        language: What reads the visual tokens.
        d_vision: Width of the visual features.
        places: See `VisualProjection`.
        word_size: Of its word embeddings, which visual tokens of a decoder-only model begin with: those of
            GPT-2 and Llama are far below one, and larger tokens would hardly be changed by its layers.
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
    """The norm that the encoder puts on all that it is given, as BART's does; None if it has none."""
    if not language.config.is_encoder_decoder:
        return None
    norm: nn.Module | None = getattr(language.get_encoder(), "layernorm_embedding", None)
    return None if isinstance(norm, nn.Identity) else norm
