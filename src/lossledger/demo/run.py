"""The main job in two acts: a U-Net with the loss everyone starts with, then with what the ledger suggests."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import lossledger as ll
from lossledger.demo.scenes import CLASS_NAMES, Scenes, make_scenes
from lossledger.demo.unet import UNet
from lossledger.ledger import Ledger
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss
from lossledger.report import report
from lossledger.report.cells import class_table_cells, comparison_cells
from lossledger.report.sentences import verdict_sentences
from lossledger.report.view import build_view
from lossledger.training.places import add_places
from lossledger.weighting import argmax_weights

# A class with less than this share of the median class's pixels is rare, and gets a weight.
RARE_BELOW = 0.5
WORST_SCENES = 6
COLOURS = np.array([[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [213, 94, 0]], dtype=float)


@dataclass(frozen=True)
class Settings:
    """What the demo runs with.

    Args:
        scenes: number of training scenes; a quarter as many for validation.
        size: edge of a scene in pixels.
        epochs: of each act.
        seed: of scenes, weights and order.
        weighting: `"class"`: a weight for each column; `"pixel"`: `weights[argmax(y_true)]` for each pixel.
        folder: where runs and report go.
    """

    scenes: int = 1536
    size: int = 64
    epochs: int = 20
    seed: int = 0
    weighting: str = "class"
    folder: Path = Path("runs/demo")


@dataclass(frozen=True)
class Act:
    """One training: its ledger and its network."""

    title: str
    ledger: Ledger
    model: ll.Model


def run(settings: Settings, console: Console | None = None) -> Path:
    """Train twice, say what each loss was made of, write the report.

    Args:
        settings: sizes, seed, folder.
        console: where to print.

    Returns:
        the path of the report.
    """
    console = console or Console()
    began = time.perf_counter()
    kept = _make_room(settings.folder)
    if kept is not None:
        console.print(f"The earlier run is kept as {kept}.")
    training = make_scenes(settings.scenes, settings.size, settings.seed)
    validation = make_scenes(max(settings.scenes // 4, 1), settings.size, settings.seed, "validation")
    console.print(
        f"{settings.scenes:,} scenes of {settings.size}×{settings.size} pixels, "
        f"{len(validation.images):,} for validation; 5 masks, digits 0 to 4.",
        highlight=False,
    )
    plain: Loss | Expression = ll.losses.BinaryCrossentropy(from_logits=True)
    first = _act(console, settings, "1-plain", plain, None, training, validation)
    weights = suggested_weights(first.ledger)
    named = ", ".join(f"{name} × {weight:g}" for name, weight in weights.items()) or "none"
    console.print(f"\nThe ledger suggests weights by class ({named}), and a loss that compares areas: Dice.")
    overlap = ll.losses.Dice(axis=(0, 1, 2), from_logits="sigmoid")
    second = _act(console, settings, "2-weighted", plain + overlap, weights, training, validation)
    _side_by_side(console, first, second, settings.folder)
    for act in (first, second):
        _look(settings.folder, act, validation)
    path = report(settings.folder, settings.folder / "report.html")
    console.print(f"\n{time.perf_counter() - began:.0f} s in all. Report: {path}", highlight=False, soft_wrap=True)
    return path


def _act(
    console: Console,
    settings: Settings,
    title: str,
    loss: Loss | Expression,
    weights: dict[str, float] | None,
    training: Scenes,
    validation: Scenes,
) -> Act:
    console.rule(f"Act {'one' if weights is None else 'two'}: {loss!r}", align="left")
    torch.manual_seed(settings.seed)
    model = ll.Model(UNet())
    model.compile(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.002, fused=True),
        loss=loss,
        metrics=["iou"],
        class_names=CLASS_NAMES,
    )
    history = model.fit(
        training.images,
        training.masks,
        batch_size=16,
        epochs=settings.epochs,
        validation_data=(validation.images, validation.masks),
        sample_weight=None if weights is None else _weights(weights, training.masks, settings.weighting),
        groups={"digits": [len(ids) for ids in training.digit_ids]},
        samples=True,
        run_dir=settings.folder / title,
        seed=settings.seed,
    )
    _say(console, history.ledger)
    return Act(title, history.ledger, model)


def _weights(weights: dict[str, float], masks: np.ndarray, weighting: str) -> torch.Tensor:
    """The class weights as sample weights: one for each mask, or one for each pixel by its class.

    Sample weights enter the sums of Dice, where a weight that is constant for a class cancels: so they weigh the
    cross-entropy alone. As `class_weight` they would also multiply the Dice loss of the class.
    """
    by_class = [weights.get(name, 1.0) for name in CLASS_NAMES]
    if weighting == "pixel":
        return argmax_weights(by_class, masks)
    return torch.tensor(by_class).expand(len(masks), 1, 1, len(by_class))


def suggested_weights(ledger: Ledger) -> dict[str, float]:
    """Class weights from how often the ledger saw each class present: the median class over the rare one.

    Args:
        ledger: of a training with a binary loss by class.

    Returns:
        one weight for each rare class, in two significant digits; classes that are not rare are left out.
    """
    present = {
        row.group: row.count
        for row in ledger.rows
        if row.split == "training" and row.kind == "class" and row.presence == "present"
    }
    median = statistics.median(present.values())
    return {
        name: float(f"{median / max(count, 1):.2g}") for name, count in present.items() if count < RARE_BELOW * median
    }


def _say(console: Console, ledger: Ledger) -> None:
    """The verdict of a run and its class table, in one screen."""
    view = build_view(ledger).runs[0]
    console.print()
    for table in view.tables:
        if table.form == "linear":
            console.print(_rich_table(*class_table_cells(table), title=f"Validation by class: {table.term}"))
    for sentence in verdict_sentences(view.verdict):
        console.print(sentence, highlight=False)


def _rich_table(heads: list[str], lines: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, head in enumerate(heads):
        table.add_column(head, justify="left" if position == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _side_by_side(console: Console, first: Act, second: Act, folder: Path) -> None:
    console.rule("Side by side, on the validation scenes", align="left")
    view = build_view(Ledger.open(folder))
    names = [first.title, second.title]
    for comparison in view.comparisons:
        console.print(_rich_table(*comparison_cells(comparison, names), title=comparison.title))
    console.print(f"\nThe terms of the last training epoch of {second.title}:")
    ledger = second.ledger
    terms = ledger.table(by=["term"], split="training", epoch=_last(ledger))
    # Nothing is masked here, and a terminal of 80 columns has no room to say so.
    shown = replace(terms, columns=tuple(column for column in terms.columns if column != "masked"))
    console.print(str(shown), highlight=False)
    total = sum(
        r.contribution for r in ledger.rows if (r.split, r.epoch, r.kind) == ("training", _last(ledger), "term")
    )
    console.print(
        f"Sum of the contributions {total!r}, printed loss {ledger.loss('training', _last(ledger))!r}.", highlight=False
    )


def _last(ledger: Ledger) -> int:
    return max(row.epoch for row in ledger.rows)


def _make_room(folder: Path) -> Path | None:
    """Move an earlier run aside: nothing that was written is lost."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = 1
    while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(kept)
    return kept


def _look(folder: Path, act: Act, validation: Scenes) -> None:
    """Where in the scenes the loss is, and the worst scenes: the picture, the target and the prediction."""
    logits = act.model.predict(validation.images, batch_size=64)
    loss = ll.losses.BinaryCrossentropy(from_logits=True)
    add_places(act.ledger, loss, validation.masks, logits, term="binary_crossentropy", most=16)
    act.ledger.flush()
    pictures = folder / act.title / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    entries = []
    for row in act.ledger.top_losses(WORST_SCENES, split="validation", term="binary_crossentropy"):
        scene, file = row["sample"], f"{row['sample']}.png"
        panel = _panel(validation.images[scene], validation.masks[scene], logits[scene] > 0)
        Image.fromarray(panel).save(pictures / file, optimize=True)
        caption = f"Scene {scene}: mean loss {row['loss']:.3g} (picture, target, prediction)"
        entries.append({"file": file, "caption": caption, "run": act.title})
    (pictures / "pictures.json").write_text(json.dumps(entries, indent=1))


def _panel(image: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    picture = np.moveaxis(image, 0, -1) * 255
    strips = [picture] + [_overlay(picture, mask) for mask in (target, predicted)]
    panel: np.ndarray = np.concatenate(strips, axis=1).clip(0, 255).astype(np.uint8)
    return panel


def _overlay(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each class in its colour on the greyed picture."""
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1) * 0.5
    covered = mask.astype(float)
    colour = covered @ COLOURS / np.maximum(covered.sum(-1, keepdims=True), 1)
    inside = covered.any(-1, keepdims=True)
    shown: np.ndarray = np.where(inside, 0.25 * grey + 0.75 * colour, grey)
    return shown
