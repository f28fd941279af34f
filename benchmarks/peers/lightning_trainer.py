"""Lightning: a LightningModule that returns the loss of a batch and logs it, `Trainer(accumulate_grad_batches=…)`.

On ranks the loss is logged with `sync_dist=True`, as its page on logging asks for. The samplers are those that
Lightning puts in by itself, given by hand because it shuffles with them.
"""

from __future__ import annotations

import logging
import warnings

import lightning
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from peers.common import ACCUMULATE, SIZE, Recorder, Reported, Task

PACKAGES = ("lightning", "torch")
TASKS = ("tokens", "dice")


class Module(lightning.LightningModule):
    def __init__(self, task: Task, ranks: int) -> None:
        super().__init__()
        self.net, self.task, self.many = task.net, task, ranks > 1
        self.recorder = Recorder(self.net.parameters())

    def training_step(self, batch, _):
        loss = self.task.loss(self.net, batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=self.many)
        return loss

    def validation_step(self, batch, _):
        self.log("evaluation", self.task.loss(self.net, batch), sync_dist=self.many)

    def configure_optimizers(self):
        return self.recorder


def run(task: Task, ranks: int) -> Reported:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    module = Module(task, ranks)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=ACCUMULATE if ranks == 1 else 1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    def loader() -> DataLoader:
        sampler = DistributedSampler(task.items, ranks, trainer.global_rank, shuffle=False) if ranks > 1 else None
        return DataLoader(task.items, batch_size=SIZE, collate_fn=task.collate, sampler=sampler)

    trainer.fit(module, loader(), loader())
    said = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Reported(said["loss"], said["evaluation"], module.recorder.seen)
