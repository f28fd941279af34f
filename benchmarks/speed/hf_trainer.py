"""Trainer of transformers with its defaults, among them fused AdamW without decay; a module that returns its loss.

Without progress bar and checkpoints, without clipping and with a constant learning rate, as the other contenders. Each
run is a Trainer of its own, made outside of the time.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from speed import nets
from speed.racer import CLOCK, Racer, Run, Task
from speed.torch_plain import first_loss

PACKAGES = ("transformers", "accelerate", "torch")


class WithLoss(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.loss_fn = nets.make(task.net), nets.LOSSES[task.net]

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": self.loss_fn(logits, labels), "logits": logits}


class Items(Dataset):
    def __init__(self, task: Task) -> None:
        self.x, self.y = torch.from_numpy(task.x), torch.from_numpy(task.y)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class Ends(transformers.TrainerCallback):
    def on_train_begin(self, *_, **__):
        CLOCK.begin()

    def on_train_end(self, *_, **__):
        CLOCK.end()


def make(task: Task) -> Racer:
    transformers.logging.set_verbosity_error()
    module, items = WithLoss(task), Items(task)

    def train() -> Run:
        arguments = transformers.TrainingArguments(
            output_dir=task.folder,
            per_device_train_batch_size=task.batch,
            num_train_epochs=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=task.precision == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(module, arguments, train_dataset=items, callbacks=[Ends()])
        # It prints what it logs where there is no bar.
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer.train

    return Racer(lambda: first_loss(task, module.net), train)
