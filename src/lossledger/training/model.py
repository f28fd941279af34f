"""`Model`: compile, fit, evaluate, predict, with Keras's arguments, around any torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.ledger import Ledger
from lossledger.objective import Objective
from lossledger.training import boundary, loop, measure, optimizers, posting, prediction, weights
from lossledger.training.average import Average
from lossledger.training.callbacks import as_callback
from lossledger.training.data import (
    Batch,
    Data,
    array_data,
    make_data,
    order_of,
    to_device,
)
from lossledger.training.progress import Show
from lossledger.training.provenance import provenance
from lossledger.training.step import StepPlan, calling, train_step
from lossledger.training.summary import summary_table

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
_POLICIES = ("raise", "skip", "record")


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What `fit` returns.

    Args:
        history: numbers by name, one an epoch: `loss`, metrics, and `val_…`.
        epoch: the epochs, from 0.
        ledger: what each loss is made of.
        params: `epochs`, `steps`, `seed`.
    """

    history: dict[str, list[float]]
    epoch: list[int]
    ledger: Ledger
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Recipe:
    """What `compile` was given, so that `fit` can add class weights to it."""

    loss: Any
    loss_weights: Any
    regularizers: Any
    class_names: Sequence[str] | None
    output_names: Sequence[str] | None

    def objective(self, class_weight: Any = None) -> Objective:
        return Objective(
            self.loss, self.loss_weights, self.regularizers, class_weight, self.output_names, self.class_names
        )


class Model:
    """A torch module with Keras's training methods, and a ledger of what each loss is made of.

    Args:
        net: any `torch.nn.Module`; it stays where it is, and is the same object as before.
        output_names: names of the outputs, when the module returns a list or tuple.

    Example:
        >>> import lossledger as ll, torch
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> model = ll.Model(torch.nn.Linear(1, 1))
        >>> model.compile(optimizer=lambda p: torch.optim.SGD(p, lr=0.5), loss="mse")
        >>> history = model.fit(x, 3 * x + 1, epochs=20, verbose=0, seed=0)
        >>> history.history["loss"][-1] < 1e-3
        True
    """

    def __init__(self, net: nn.Module, output_names: Sequence[str] | None = None) -> None:
        if not isinstance(net, nn.Module):
            raise InputTypeError(
                f"Model: expected a torch.nn.Module, received {type(net).__name__}. "
                + ("Make an instance of it first." if isinstance(net, type) else "")
            )
        self.net = net
        self.stop_training = False
        self.ledger: Ledger | None = None
        self._output_names = output_names
        self._forward = calling(net)
        self._recipe: _Recipe | None = None
        self._plan: StepPlan | None = None
        self._metrics: tuple[measure.MetricPlan, ...] = ()
        self._on_nonfinite = "raise"
        self._ema: float | None = None

    # --- compile -----------------------------------------------------------------------------------------------

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        regularizers: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        precision: str = "float32",
        clip_norm: float | None = None,
        ema: float | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        """Resolve everything once: objective, optimizer, metrics.

        Args:
            optimizer: a name (Keras's defaults), a torch optimizer, or a function of the parameters.
            loss: one loss, a list or a dict by output; `None` skips an output.
            loss_weights: λ, a number, or by output (or auxiliary loss).
            metrics: names or metrics, or by output; sample weights do not apply to them.
            weighted_metrics: metrics to which sample weights apply.
            regularizers: by pattern of parameter names, each a term of its own.
            class_names: names of the classes, in order, for the ledger and for `class_weight`.
            precision: `"float32"`, or `"bfloat16"` for autocast in the forward pass (losses stay in float32).
            clip_norm: largest norm of the whole gradient.
            ema: decay of an exponential moving average of the weights, for example 0.999; `fit` ends with the
                averaged weights in place, as Keras's `use_ema` does.
            on_nonfinite: `"raise"` stops at the first NaN or infinity, `"skip"` leaves such steps out, `"record"` goes
                on and counts them.

        Raises:
            UnknownNameError: a name that does not exist, with a suggestion.
            InputError: a value that cannot be right.
        """
        if loss is None:
            raise InputError("compile: expected a loss, received None. For example compile(loss='mse').")
        if precision not in _PRECISIONS:
            raise UnknownNameError("precision", precision, _PRECISIONS)
        if on_nonfinite not in _POLICIES:
            raise UnknownNameError("on_nonfinite", on_nonfinite, _POLICIES)
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"clip_norm: expected a positive number, received {clip_norm!r}.")
        if ema is not None and not 0 < ema < 1:
            raise InputError(f"ema: expected a decay between 0 and 1, received {ema!r}.")
        self._recipe = _Recipe(loss, loss_weights, regularizers, class_names, self._output_names)
        objective = self._recipe.objective()
        for penalty in objective.penalties:
            objective.penalized(penalty, self.net)
        made = optimizers.make(optimizer, self.net.parameters())
        self._plan = StepPlan(
            self.net,
            self._forward,
            objective,
            made,
            tuple(p for p in self.net.parameters() if p.requires_grad),
            _PRECISIONS[precision],
            clip_norm,
            on_nonfinite != "record",
        )
        self._metrics = measure.plan(objective, metrics, weighted_metrics)
        self._on_nonfinite = on_nonfinite
        self._ema = ema

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `compile` resolved."""
        return self._compiled().optimizer

    @property
    def objective(self) -> Objective:
        """The objective that `compile` resolved."""
        return self._compiled().objective

    def _compiled(self) -> StepPlan:
        if self._plan is None:
            raise InputError("The model is not compiled: call model.compile(optimizer=…, loss=…) first.")
        return self._plan

    # --- fit ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        mask: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_freq: int = 1,
        run_dir: str | Path | None = None,
        seed: int | None = None,
    ) -> History:
        """Train.

        Args:
            x: inputs (an array, or a dict or tuple of arrays), or an iterable of batches `(x, y)`,
                `(x, y, sample_weight)` or `lossledger.Batch`.
            y: targets, by output where there are several; not beside an iterable.
            batch_size: samples of a batch; the last batch of an epoch may be smaller.
            epochs: number of the last epoch.
            verbose: 0 silent, 1 bar, 2 one line an epoch, "auto" a bar in a terminal and lines elsewhere.
            callbacks: callbacks, or torch schedulers.
            validation_split: share of the samples, from the end, kept for validation.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or an iterable of batches.
            shuffle: a new order every epoch; of arrays only.
            class_weight: by class index or name; by output, then class, where there are several. Not for validation.
            sample_weight: `[B]` or one an entry.
            mask: `[B]` or one an entry, True where it counts.
            initial_epoch: where to start counting.
            steps_per_epoch: batches of an epoch.
            validation_freq: validate every so many epochs.
            run_dir: folder of the run; the ledger is written there after every epoch.
            seed: of the order of the samples; drawn from torch's generator if not given.

        Returns:
            the history, with the ledger.
        """
        plan = self._compiled()
        assert self._recipe is not None
        boundary.positive(batch_size, "batch_size")
        boundary.positive(epochs, "epochs")
        if class_weight is not None:
            plan = replace(plan, objective=self._recipe.objective(class_weight))
        data = make_data(x, y, sample_weight, mask, self._dtype())
        if run_dir is not None:
            boundary.new_run(Path(run_dir))
        self._shuffle = shuffle
        data, validation = boundary.validation(data, validation_split, validation_data, self._dtype())
        boundary.check_targets(plan, data, self._device())
        seed = int(torch.randint(2**31, ())) if seed is None else int(seed)
        self.ledger = ledger = Ledger(
            "run" if run_dir is None else Path(run_dir).name, provenance(plan, seed, batch_size)
        )
        history: dict[str, list[float]] = {}
        watchers = [as_callback(c) for c in callbacks or ()]
        average = Average(plan.parameters, self._ema)
        options = loop.TrainOptions(
            batch_size,
            steps_per_epoch,
            "class",
            self._on_nonfinite,
            boundary.checked_at_once(data, self._device()),
            watchers,
            average.update if self._ema is not None else None,
        )
        available = data.steps(batch_size)
        if steps_per_epoch is not None:
            boundary.positive(steps_per_epoch, "steps_per_epoch")
            if available is not None and steps_per_epoch > available:
                raise InputError(
                    f"steps_per_epoch: expected at most {available}, the batches of one pass over the data; received "
                    f"{steps_per_epoch}. Train for more epochs instead."
                )
        steps = available if steps_per_epoch is None else steps_per_epoch
        params = {"epochs": epochs, "steps": steps, "seed": seed}
        done: list[int] = []
        step = 1
        self.stop_training = False
        for callback in watchers:
            callback.set_model(self)
            callback.on_train_begin({})
        try:
            with Show(verbose, epochs) as show:
                for epoch in range(initial_epoch, epochs):
                    result = self._epoch(plan, data, options, show, ledger, epoch, epochs, seed, step)
                    step += result.steps
                    logs = dict(result.logs)
                    if validation is not None and (epoch + 1) % validation_freq == 0:
                        logs |= self._validate(validation, batch_size, show, ledger, epoch + 1)
                    for name, value in logs.items():
                        history.setdefault(name, []).append(value)
                    done.append(epoch)
                    show.end(f"epoch {epoch + 1}/{epochs}", result.steps, result.seconds, logs)
                    if run_dir is not None:
                        ledger.save(run_dir)
                    for callback in watchers:
                        callback.on_epoch_end(epoch, logs)
                    if self.stop_training:
                        break
        finally:
            average.install()
            for callback in watchers:
                callback.on_train_end({})
        return History(history, done, ledger, params)

    def _epoch(
        self,
        plan: StepPlan,
        data: Data,
        options: loop.TrainOptions,
        show: Show,
        ledger: Ledger,
        epoch: int,
        epochs: int,
        seed: int,
        step: int,
    ) -> loop.PassResult:
        for callback in options.callbacks:
            callback.on_epoch_begin(epoch, {})
        steps = data.steps(options.batch_size) if options.steps is None else options.steps
        show.begin(f"epoch {epoch + 1}/{epochs}", steps)
        current = loop.Pass(plan.objective, self._metrics, self._device(), show, "")
        order = order_of(data.length, seed, epoch) if data.length is not None and self._shuffle else None
        result = loop.train_epoch(plan, data, order, options, current, step)
        ledger.append(
            posting.rows(plan.objective, result.tallies, "training", epoch + 1),
            measure.metric_rows(plan.objective, result.metrics, "training", epoch + 1),
        )
        return result

    # --- evaluate and predict ----------------------------------------------------------------------------------

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        verbose: Any = "auto",
        sample_weight: Any = None,
        mask: Any = None,
        steps: int | None = None,
        return_dict: bool = False,
    ) -> Any:
        """The loss and the metrics of data, the same for every batch size.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            batch_size: samples of a batch.
            verbose: as in `fit`.
            sample_weight: as in `fit`.
            mask: as in `fit`.
            steps: number of batches, if not all.
            return_dict: return numbers by name.

        Returns:
            the loss, or a list of the loss and the other numbers, or a dict.
        """
        boundary.positive(batch_size, "batch_size")
        data = make_data(x, y, sample_weight, mask, self._dtype())
        boundary.check_targets(self._compiled(), data, self._device())
        with Show(verbose, 0) as show:
            result = self._evaluate(data, batch_size, steps, show)
            show.end("evaluate", result.steps, result.seconds, result.logs)
        self.ledger = ledger = Ledger("evaluate", provenance(self._compiled(), None, batch_size))
        self._post(result, ledger, "test", 0)
        return result.logs if return_dict else _as_keras(result.logs)

    def _evaluate(self, data: Data, batch_size: int, steps: int | None, show: Show) -> loop.PassResult:
        plan = self._compiled()
        total = data.steps(batch_size) if steps is None else steps
        show.begin("evaluate", total)
        current = loop.Pass(plan.objective, self._metrics, self._device(), show, "evaluate")
        return loop.evaluate_pass(
            plan, data, batch_size, steps, current, boundary.checked_at_once(data, self._device())
        )

    def _validate(self, data: Data, batch_size: int, show: Show, ledger: Ledger, epoch: int) -> dict[str, float]:
        result = self._evaluate(data, batch_size, None, show)
        self._post(result, ledger, "validation", epoch)
        return {f"val_{name}": value for name, value in result.logs.items()}

    def _post(self, result: loop.PassResult, ledger: Ledger, split: str, epoch: int) -> None:
        objective = self._compiled().objective
        ledger.append(
            posting.rows(objective, result.tallies, split, epoch),
            measure.metric_rows(objective, result.metrics, split, epoch),
        )

    def predict(self, x: Any, batch_size: int = 32, verbose: Any = 0, steps: int | None = None) -> Any:
        """What the model returns, as NumPy arrays in the structure of its outputs.

        Args:
            x: inputs, or an iterable of inputs or of batches `(x, y)`.
            batch_size: samples of a batch.
            verbose: as in `fit`.
            steps: number of batches, if not all.
        """
        boundary.positive(batch_size, "batch_size")
        autocast = None if self._plan is None else self._plan.autocast
        return prediction.predict(
            self.net, self._forward, x, batch_size, steps, autocast, self._device(), self._dtype()
        )

    # --- single batches ----------------------------------------------------------------------------------------

    def train_on_batch(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        mask: Any = None,
        class_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """One step on one batch; the numbers are of this batch, at the weights before the step."""
        plan = self._compiled()
        assert self._recipe is not None
        if class_weight is not None:
            plan = replace(plan, objective=self._recipe.objective(class_weight))
        self.net.train()
        batch = self._batch(x, y, sample_weight, mask)
        tallies, outputs = train_step(plan, batch, None, checked=False)
        current = self._single(plan.objective)
        current.add(batch, tallies, outputs)
        result = current.result()
        if self._on_nonfinite == "raise":
            loop.stop_if_bad(plan, result.tallies, [(1, batch, tallies)])
        return result.logs if return_dict else _as_keras(result.logs)

    def test_on_batch(
        self, x: Any, y: Any, sample_weight: Any = None, mask: Any = None, return_dict: bool = False
    ) -> Any:
        """The loss and the metrics of one batch."""
        plan = self._compiled()
        data = array_data(x, y, sample_weight, mask, self._dtype())
        result = loop.evaluate_pass(plan, data, data.length, None, self._single(plan.objective), checked=False)
        return result.logs if return_dict else _as_keras(result.logs)

    def predict_on_batch(self, x: Any) -> Any:
        """What the model returns for one batch, as NumPy arrays."""
        data = array_data(x, dtype=self._dtype())
        return self.predict(x, batch_size=data.length)

    # --- weights and summary -----------------------------------------------------------------------------------

    def save_weights(self, path: str | Path) -> None:
        """Write the weights and buffers as safetensors, to a temporary file first, so that no half file is left.

        Args:
            path: path of the file; an existing file is replaced once the new one is complete.
        """
        weights.save(self.net, path)

    def load_weights(self, path: str | Path) -> None:
        """Read weights that `save_weights` wrote.

        Raises:
            InputError: no such file, or weights of another model.
        """
        weights.load(self.net, path)

    def summary(self, print_fn: Any = None) -> None:
        """Print the modules with parameters, their shapes and sizes."""
        (print if print_fn is None else print_fn)(summary_table(self.net))

    # --- inside ------------------------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        """The dtype that floating NumPy arrays take: that of the parameters."""
        return next((p.dtype for p in self.net.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def _device(self) -> torch.device:
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def _batch(self, x: Any, y: Any, sample_weight: Any, mask: Any) -> Batch:
        data = array_data(x, y, sample_weight, mask, self._dtype())
        return to_device(Batch(data.x, data.y, data.sample_weight, data.mask), self._device())

    def _single(self, objective: Objective) -> loop.Pass:
        return loop.Pass(objective, self._metrics, self._device(), Show(0, 0), "")


def _as_keras(logs: dict[str, float]) -> Any:
    values = list(logs.values())
    return values[0] if len(values) == 1 else values
