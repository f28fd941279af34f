"""What every contender is given: the same data and models; and what is right: one batch in float64.

The learning rate is 0, so all steps of an epoch start from the same weights, the loss of the epoch is that of the data
under these weights, and the gradient of each step is told by the optimizer, which keeps what it is called with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEEDS = range(5)
COUNT, SIZE, ACCUMULATE = 43, 4, 4
WORDS, LABELS, IGNORED = 50, 5, -100


# --- token sequences -----------------------------------------------------------------------------------------------


def sequences(seed: int) -> list[dict[str, Any]]:
    """Sentences of 2 to 30 words, most of them short, with a label for each word."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(COUNT):
        words = rng.integers(1, WORDS, 2 + int(28 * rng.random() ** 2))
        noise = rng.integers(0, LABELS, len(words))
        labels = np.where(rng.random(len(words)) < 0.7, words % LABELS, noise)
        found.append({"input_ids": words.tolist(), "labels": labels.tolist()})
    return found


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch padded to its longest sentence: words with 0, labels with -100."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])

    words = padded("input_ids", 0)
    return {"input_ids": words, "attention_mask": (words != 0).long(), "labels": padded("labels", IGNORED)}


class Tagger(nn.Module):
    """A small transformer that labels each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, LABELS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.words(words), src_key_padding_mask=words == 0))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As users write it: the mean over the words of a batch."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


# --- pictures ------------------------------------------------------------------------------------------------------


def pictures(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noisy pictures with one square each, of 2 to 15 pixels a side."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(COUNT):
        mask = torch.zeros(1, 16, 16)
        side = 2 + int(14 * float(torch.rand((), generator=g)) ** 2)
        top, left = (int(torch.randint(0, 17 - side, (), generator=g)) for _ in range(2))
        mask[:, top : top + side, left : left + side] = 1
        found.append((mask + 0.5 * torch.randn(1, 16, 16, generator=g), mask))
    return found


class Painter(nn.Module):
    """A small network that marks pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """As users write it: 1 − 2·intersection / sizes, over the pixels of a batch."""
    found = torch.sigmoid(logits)
    return 1 - 2 * (found * target).sum() / (found.sum() + target.sum())


# --- tasks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Data, model and loss, as users write them.

    Args:
        items: the data set, in order.
        collate: makes a batch of items.
        net: the model in float32.
        loss: of a batch, from the model.
    """

    items: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    net: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]


def tokens(seed: int) -> Task:
    torch.manual_seed(seed)
    return Task(sequences(seed), collate, Tagger(), lambda net, b: token_loss(net(b["input_ids"]), b["labels"]))


def masks(seed: int) -> Task:
    torch.manual_seed(seed)
    return Task(pictures(seed), stacked, Painter(), lambda net, b: dice_loss(net(b[0]), b[1]))


def stacked(items: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*items, strict=True)
    return torch.stack(images), torch.stack(masks)


TASKS = {"tokens": tokens, "dice": masks}


# --- what is right, and how far off a contender is -----------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradients of each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        self.seen.append(flat(p.grad for group in self.param_groups for p in group["params"]))
        return found


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


@dataclass(frozen=True)
class Reported:
    """What a contender said of an epoch.

    Args:
        epoch: the training loss of the epoch, `None` where it reports none.
        evaluation: the loss of the same data, evaluated.
        gradients: of each optimizer step.
    """

    epoch: float | None
    evaluation: float | None
    gradients: list[Tensor]


def steps(size: int) -> list[range]:
    """The samples of each optimizer step."""
    return [range(start, min(start + size, COUNT)) for start in range(0, COUNT, size)]


def right(task: Task, size: int) -> Reported:
    """The whole data and the whole steps as one batch in float64."""
    net = copy.deepcopy(task.net).double()
    found = []
    for ids in steps(size):
        net.zero_grad()
        task.loss(net, doubled(task.collate([task.items[i] for i in ids]))).backward()
        found.append(flat(p.grad for p in net.parameters() if p.grad is not None))
    with torch.no_grad():
        whole = float(task.loss(net, doubled(task.collate(task.items))))
    return Reported(whole, whole, found)


def doubled(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: doubled(value) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(doubled(value) for value in batch)
    return batch.double() if batch.is_floating_point() else batch


def errors(said: Reported, true: Reported) -> dict[str, float | str | None]:
    """Relative errors; a last step that was not taken is said in words."""

    def of(value: float | None, exact: float | None) -> float | None:
        return None if value is None or exact is None else abs(value - exact) / abs(exact)

    def gap(mine: Tensor, exact: Tensor) -> float:
        return float((mine - exact).norm() / exact.norm())

    full = len(true.gradients) - 1
    assert full <= len(said.gradients) <= full + 1, (len(said.gradients), full + 1)
    taken = len(said.gradients) > full
    return {
        "epoch": of(said.epoch, true.epoch),
        "evaluation": of(said.evaluation, true.evaluation),
        "steps": max(gap(a, b) for a, b in zip(said.gradients[:full], true.gradients[:full], strict=True)),
        "last": gap(said.gradients[full], true.gradients[full]) if taken else "no step",
    }
