"""The torch modules of the workloads, their losses as users of torch write them, and their weights for Keras."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossledger.demo.unet import UNet
from speed.workloads import CLASSES, LENGTH, PADDING, PIXELS, VOCABULARY

WIDTH, HEADS, INNER, LAYERS = 128, 4, 512, 2


class Language(nn.Module):
    """A small transformer that predicts the next word. Padding comes last, so that no word attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("after", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        found = self.words(words) + self.places.weight
        for layer in self.layers:
            found = layer(found, src_mask=self.after, is_causal=True)
        return self.head(found)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


_NETS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(3, 3),
    "mlp": mlp,
    "unet": UNet,
    "language": Language,
}


def make(net: str) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return _NETS[net]()


def words_loss(logits: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=PADDING)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dense": F.mse_loss,
    "mlp": F.cross_entropy,
    "unet": F.binary_cross_entropy_with_logits,
    "language": words_loss,
}


# --- weights for Keras -------------------------------------------------------------------------------------------


def keras_weights(net: nn.Module) -> dict[str, list[Tensor]]:
    """By the name of the layer in `speed.keras_nets`, in Keras's layouts."""
    if isinstance(net, nn.Linear):
        found = {"head": _dense(net)}
    elif isinstance(net, nn.Sequential):
        found = {name: _dense(net[index]) for name, index in (("dense-0", 0), ("dense-1", 2), ("head", 4))}
    elif isinstance(net, UNet):
        found = {"head": _convolution(net.head)}
        for side in ("down", "up"):
            for level, block in enumerate(getattr(net, side)):
                found |= {f"{side}-{level}-{index // 2}": _convolution(block[index]) for index in (0, 2)}
        found |= {f"enlarge-{level}": _convolution(layer) for level, layer in enumerate(net.enlarge)}
    elif isinstance(net, Language):
        found = {"words": [net.words.weight], "places": [net.places.weight], "head": _dense(net.head)}
        for index, layer in enumerate(net.layers):
            found |= {f"{name}-{index}": value for name, value in _transformer(layer).items()}
    return {name: [tensor.detach() for tensor in tensors] for name, tensors in found.items()}


def _dense(layer: nn.Linear) -> list[Tensor]:
    return [layer.weight.T, layer.bias]


def _convolution(layer: nn.Conv2d | nn.ConvTranspose2d) -> list[Tensor]:
    return [layer.weight.permute(2, 3, 1, 0), layer.bias]


def _transformer(layer: nn.TransformerEncoderLayer) -> dict[str, list[Tensor]]:
    attention, size = layer.self_attn, WIDTH // HEADS
    kernels = attention.in_proj_weight.reshape(3, HEADS, size, WIDTH).permute(0, 3, 1, 2)
    biases = attention.in_proj_bias.reshape(3, HEADS, size)
    into = [tensor for pair in zip(kernels, biases, strict=True) for tensor in pair]
    out = [attention.out_proj.weight.T.reshape(HEADS, size, WIDTH), attention.out_proj.bias]
    return {
        "attention": into + out,
        "norm-a": [layer.norm1.weight, layer.norm1.bias],
        "norm-b": [layer.norm2.weight, layer.norm2.bias],
        "inner": _dense(layer.linear1),
        "outer": _dense(layer.linear2),
    }
