"""Lightning: a LightningModule that returns the loss of a batch and logs it, a Trainer with its defaults.

Without progress bar, summary of the model and checkpoints. Each run is a Trainer of its own, made outside of the time.
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader

from speed import nets
from speed.racer import CLOCK, Racer, Run, Task
from speed.torch_plain import first_loss, tensors

PACKAGES = ("lightning", "torch")


class Module(lightning.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.loss_fn = nets.make(task.net), nets.LOSSES[task.net]

    def training_step(self, batch, _):
        x, y = batch
        loss = self.loss_fn(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def on_train_start(self):
        CLOCK.begin()

    def on_train_end(self):
        CLOCK.end()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def make(task: Task) -> Racer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    module = Module(task)

    def train() -> Run:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="bf16-mixed" if task.precision == "bfloat16" else "32-true",
            default_root_dir=task.folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(tensors(task), batch_size=task.batch, shuffle=True)
        return lambda: trainer.fit(module, loader)

    return Racer(lambda: first_loss(task, module.net), train)
