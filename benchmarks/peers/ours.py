"""lossledger: `fit` and `evaluate` on arrays, with a mask for the padding."""

from __future__ import annotations

import lossledger as ll
from peers.common import ACCUMULATE, SIZE, Recorder, Reported, Task

PACKAGES = ("lossledger", "torch")
TASKS = ("tokens", "dice")


def run(task: Task, ranks: int) -> Reported:
    model, made = ll.Model(task.net), []

    def optimizer(parameters):
        made.append(Recorder(parameters))
        return made[0]

    batch = task.collate(task.items)
    if isinstance(batch, dict):
        loss = ll.losses.SparseCategoricalCrossentropy(from_logits=True)
        data = {"x": batch["input_ids"], "y": batch["labels"].clamp(min=0), "mask": batch["attention_mask"].bool()}
    else:
        loss = ll.losses.Dice(from_logits="sigmoid")
        data = dict(zip("xy", batch, strict=True))
    model.compile(optimizer, loss)
    size, accumulate = (SIZE, ACCUMULATE) if ranks == 1 else (SIZE * ranks, 1)
    history = model.fit(**data, batch_size=size, accumulate=accumulate, shuffle=False, verbose=0)
    evaluated = model.evaluate(**data, batch_size=size, verbose=0)
    return Reported(history.history["loss"][0], float(evaluated), made[0].seen)
