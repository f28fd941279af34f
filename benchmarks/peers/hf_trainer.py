"""Trainer of transformers with its defaults, without clipping and shuffling.

Two models of the library: one that labels words (Bert), and a language model that predicts the next word (Llama),
whose loss takes the number of words of the step from the Trainer.
"""

from __future__ import annotations

import tempfile

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import SequentialSampler

from peers.common import ACCUMULATE, IGNORED, LABELS, SIZE, WORDS, Recorder, Reported, Task, collate, sequences

PACKAGES = ("transformers", "accelerate", "torch")
TASKS = ("labels", "language")
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    # As large as those of torch, so that the losses of sentences differ before any training.
    "initializer_range": 0.5,
}


def labels(seed: int) -> Task:
    torch.manual_seed(seed)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    net = transformers.BertForTokenClassification(transformers.BertConfig(**SHAPE, **off, num_labels=LABELS))
    return Task(sequences(seed), collate, net, lambda net, b: mean(logits(net, b), b["labels"]))


def language(seed: int) -> Task:
    torch.manual_seed(seed)
    items = [{"input_ids": item["input_ids"], "labels": item["input_ids"]} for item in sequences(seed)]
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    return Task(items, collate, net, lambda net, b: mean(logits(net, b)[:, :-1], b["labels"][:, 1:]))


def logits(net, batch):
    return net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def mean(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def run(task: Task, ranks: int) -> Reported:
    recorder = Recorder(p for p in task.net.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=SIZE,
            per_device_eval_batch_size=SIZE,
            gradient_accumulation_steps=ACCUMULATE if ranks == 1 else 1,
            num_train_epochs=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="epoch",
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(recorder, lambda step: 1.0)
        trainer = InOrder(
            task.net,
            arguments,
            data_collator=task.collate,
            train_dataset=task.items,
            eval_dataset=task.items,
            optimizers=(recorder, schedule),
        )
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        evaluated = trainer.evaluate()["eval_loss"]
    return Reported(logged[-1], evaluated, recorder.seen)
