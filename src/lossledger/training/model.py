"""`Model`: compile, fit, evaluate, predict, with Keras's arguments, around any torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossledger.distributed import unwrapped
from lossledger.errors import InputError, NonFiniteError
from lossledger.forward import Recipe
from lossledger.integrations import compiled_arguments, forward_of
from lossledger.ledger import Ledger
from lossledger.objective import Objective
from lossledger.objective import plan as planning
from lossledger.training import boundary, loop, memory, opening, optimizers, prediction, sharing, sums
from lossledger.training.average import Average
from lossledger.training.callbacks import as_callbacks
from lossledger.training.checking import checking
from lossledger.training.compiled import Compiled, Settings, built, resolved
from lossledger.training.data import Data, array_data, make_data
from lossledger.training.fitting import Fitting, evaluated, post
from lossledger.training.history import History, as_keras
from lossledger.training.modes import training
from lossledger.training.placed import Placed
from lossledger.training.progress import Show
from lossledger.training.provenance import provenance
from lossledger.training.sampling import check_samples, numbering


class Model(Placed):
    """A torch module with Keras's training methods, and a ledger of what each loss is made of.

    Args:
        net: any `torch.nn.Module`, also a Keras 3 model on the torch backend; it stays where it is, and is the same
            object as before. Of a `DistributedDataParallel` the module inside is taken.
        output_names: names of the outputs, when the module returns a list or tuple; those of a Keras model are known.
        process_group: the ranks that share the data, or a mesh of one dimension; all ranks if `None`. See `window`.

    Raises:
        InputTypeError: no torch module, such as a Keras model on another backend.
        InputError: a Keras model that was sharded.

    Example:
        >>> import lossledger as ll, torch
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> model = ll.Model(torch.nn.Linear(1, 1))
        >>> model.compile(optimizer=lambda p: torch.optim.SGD(p, lr=0.5), loss="mse")
        >>> history = model.fit(x, 3 * x + 1, epochs=20, verbose=0, seed=0)
        >>> history.history["loss"][-1] < 1e-3
        True
    """

    def __init__(self, net: nn.Module, output_names: Sequence[str] | None = None, process_group: Any = None) -> None:
        net = unwrapped(net)
        super().__init__(net, forward_of(net), process_group)
        self.stop_training = False
        self.ledger: Ledger | None = None
        self._output_names = output_names
        self._settings: Settings | None = None
        self._resolved: Compiled | None = None

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
        jit: bool = False,
        clip_norm: float | None = None,
        ema: float | None = None,
        on_nonfinite: str = "raise",
        reproducible: bool = False,
    ) -> None:
        """Resolve everything once: objective, optimizer, metrics.

        Args:
            optimizer: a name (Keras's defaults), a torch optimizer, or a function of the parameters; for a Keras model
                also an optimizer of Keras.
            loss: one loss, a list or a dict by output; `None` skips an output.
            loss_weights: λ, a number, or by output (or auxiliary loss).
            metrics: names or metrics, or by output; sample weights do not apply to them.
            weighted_metrics: metrics to which sample weights apply.
            regularizers: by pattern of parameter names, each a term of its own.
            class_names: names of the classes, in order, for the ledger and for `class_weight`.
            precision: `"float32"`, or `"bfloat16"` for autocast in the forward pass (losses stay in float32).
            jit: compile the whole step of `fit`, optimizer and sums included; see docs/training.md for which.
            clip_norm: largest norm of the whole gradient.
            ema: decay of an exponential moving average of the weights, for example 0.999; `fit` ends with the
                averaged weights in place, as Keras's `use_ema` does. It starts from the weights after the first step.
            on_nonfinite: `"raise"` stops at the first NaN or infinity, `"skip"` leaves such steps out, `"record"` goes
                on and counts them.
            reproducible: totals of the losses that have the same bits for any split of the data and any number of
                ranks, given the same predictions; see docs/windows.md.

        Raises:
            UnknownNameError: a name that does not exist, with a suggestion.
            InputError: a value that cannot be right.
        """
        boundary.check_compile(loss, precision, clip_norm, ema, on_nonfinite, reproducible, jit)
        self._forward.check(precision)
        names = planning.class_names(class_names)
        given = (loss, loss_weights, metrics, weighted_metrics, regularizers, names)
        recipe = Recipe(*given, self._output_names, reproducible)
        # Errors of the recipe are raised here, also where the rest waits for the first batch.
        self._forward.understood(recipe).objective()
        autocast = boundary.PRECISIONS[precision]
        self._settings = Settings(recipe, optimizer, autocast, clip_norm, ema, on_nonfinite, jit)
        self._resolved = resolved(self._forward, self._settings) if self._forward.built else None

    @classmethod
    def from_compiled(cls, net: Any, targets: Any = None, **options: Any) -> Model:
        """A Keras model with the loss, the weights, the metrics and the optimizer that its own `compile` was given.

        Args:
            net: a compiled Keras model on the torch backend.
            targets: some targets, for the loss "crossentropy", which Keras chooses by their shape.
            options: further or other arguments of `compile`, such as `class_names`.

        Raises:
            InputError: a model that was not compiled, or something of it that has no counterpart, by its name.
        """
        model = cls(net)
        model.compile(**{**compiled_arguments(net, targets), **options})
        return model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `compile` resolved."""
        return self._compiled().plan.optimizer

    @property
    def objective(self) -> Objective:
        """The objective that `compile` resolved."""
        return self._compiled().plan.objective

    def _compiled(self) -> Compiled:
        settings = self._require_compiled()
        if self._resolved is None:
            self._resolved = resolved(self._forward, settings)
        return self._resolved

    def _require_compiled(self) -> Settings:
        if self._settings is None:
            raise InputError(
                "The model is not compiled: You must call `compile()` before using the model, as "
                "model.compile(optimizer=…, loss=…)."
            )
        return self._settings

    def _built(self, data: Data) -> Data:
        return data if self._forward.built else built(self._forward, data, self._device())

    # --- fit ---------------------------------------------------------------------------------------------------

    @sharing.on_all_ranks
    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        accumulate: int = 1,
        verbose: Any = "auto",
        callbacks: Sequence[Any] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        mask: Any = None,
        groups: Mapping[str, Any] | None = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_freq: int = 1,
        run_dir: str | Path | None = None,
        resume: bool = False,
        seed: int | None = None,
        checks: str = "warn",
        ignore_checks: Sequence[str] = (),
        ledger_steps: int | None = None,
        samples: bool = False,
        spread: bool = False,
    ) -> History:
        """Train.

        Args:
            x: inputs (an array, or a dict, tuple or list of arrays), or an iterable, such as a list or a DataLoader, of
                batches `(x, y)`, `(x, y, sample_weight)` or `lossledger.Batch`. A tuple is never taken for batches.
            y: targets, by output where there are several; not beside an iterable.
            batch_size: samples of a batch of arrays, 32 if not given; the last batch of an epoch may be smaller. Not
                beside an iterable.
            epochs: number of the last epoch.
            accumulate: batches of an optimizer step; its gradient is that of one batch of all their samples. The last
                step of an epoch may have fewer. Steps of callbacks, progress and ledger are optimizer steps.
            verbose: 0 silent, 1 bar, 2 one line an epoch, "auto" a bar in a terminal and lines elsewhere.
            callbacks: one callback or several, or torch schedulers.
            validation_split: share of the samples, from the end, kept for validation.
            validation_data: `(x, y)`, `(x, y, sample_weight)`, or an iterable (such as a list) of batches.
            shuffle: a new order every epoch; of arrays only.
            class_weight: by class index or name; by output, then class, where there are several. Not for validation.
            sample_weight: `[B]` or one an entry.
            mask: `[B]` or one an entry, True where it counts.
            groups: by kind, as `{"site": ids}`, each sample's group, by which the ledger divides every term too.
            initial_epoch: where to start counting.
            steps_per_epoch: batches of an epoch. Each epoch starts over at the first batch: with `shuffle=False` later
                ones are never seen. Only a generator goes on where it was.
            validation_freq: validate every so many epochs.
            run_dir: folder of the run; the ledger is written there after every epoch, and checkpoints in between.
            resume: go on with the run in `run_dir` from its newest checkpoint, as if it had not been interrupted; an
                empty folder starts a new one. Weights, optimizer, random states and order come from the checkpoint.
            seed: of the order of the samples; drawn from torch's generator if not given.
            checks: "warn" prints what looks wrong about loss, data and weights, each thing once; "error" raises it;
                "off". Findings are kept as `ledger.info["findings"]`.
            ignore_checks: codes to leave out, see `docs/checks`.
            ledger_steps: steps whose sums become rows of the ledger with a step, besides the rows of each epoch.
            samples: keep the loss of every sample by term in every epoch, see `Ledger.samples`.
            spread: keep the smallest and largest element and Σ element² of each row, at the cost of another pass over
                the elements.

        Returns:
            the history, with the ledger.

        Raises:
            CheckpointError: a run that cannot be resumed: damaged, of another recipe, or on data that cannot go on.
        """
        group = self._group()
        writes = group.rank == 0
        batch_size = boundary.batch_size_of(batch_size, x, validation_data)
        epochs, accumulate, initial_epoch, validation_freq, ledger_steps = boundary.check_fit(
            epochs, accumulate, initial_epoch, validation_freq, run_dir, resume, ledger_steps, writes
        )
        settings = self._require_compiled()
        data = self._built(make_data(x, y, sample_weight, mask, self._dtype(), groups))
        device, compiled = self._device(), self._compiled()
        plan = compiled.weighted(class_weight)
        optimizers.check_trainable(plan.parameters)
        data, held = boundary.validation(data, validation_split, validation_data, self._dtype())
        steps = boundary.steps_of(steps_per_epoch, data.steps(batch_size))
        sharing.check_shared(
            group,
            plan.objective,
            {"x": data, "validation data": held},
            batch_size=batch_size,
            accumulate=accumulate,
            epochs=epochs,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            shuffle=bool(shuffle),
            validation_freq=validation_freq,
        )
        known = compiled.known_to(group)
        assumed = boundary.check_targets_of_all(plan, compiled.plan, data, held, device, known)
        boundary.warn_if_trainable_changed(plan, self._forward.named_parameters())
        calls = as_callbacks(callbacks)
        found = opening.found_by(group, run_dir if resume else None)
        seed = boundary.seed_of(seed) if found is None or seed is not None else found.state["recipe"]["seed"]
        seed = int(group.gather(seed)[0])
        sharing.begin(group, self.net, seed)
        average = Average(plan.parameters, settings.ema)
        made = provenance(plan, seed, batch_size, accumulate, group.size)
        show = Show(verbose if writes else 0)
        fitting = Fitting(
            forward=self._forward,
            plan=plan,
            frozen_plan=compiled.plan,
            metrics=compiled.metrics,
            data=data,
            validation=held,
            validation_freq=validation_freq,
            options=loop.TrainOptions(
                batch_size=batch_size,
                accumulate=accumulate,
                steps=None if steps_per_epoch is None else steps,
                by="class",
                every=ledger_steps,
                on_nonfinite=settings.on_nonfinite,
                checked=boundary.checked_at_once(data, device),
                callbacks=calls,
                after_step=average.update if settings.ema is not None else None,
                assumed=assumed,
            ),
            device=device,
            epochs=range(initial_epoch, epochs),
            shuffled=bool(shuffle),
            seed=seed,
            ledger=Ledger("run" if run_dir is None else Path(run_dir).name, made),
            run_dir=run_dir,
            stopped=lambda: self.stop_training,
            stop=lambda value: setattr(self, "stop_training", value),
            average=average,
            group=group,
            samples=check_samples(samples),
            spread=bool(spread),
            first_held=(data.length or 0) if validation_split else 0,
        )
        fitting = opening.opened(
            fitting, found, lambda ledger: checking(checks, ignore_checks, plan.objective, ledger, show, group)
        )
        self.ledger = fitting.ledger
        params = {"epochs": epochs, "steps": boundary.updates_of(steps, accumulate), "seed": seed}
        params_of_callbacks = {**params, "validation": held is not None, "resumed": found is not None}
        with opening.leaving(fitting):
            return History(*self._run(fitting, show, params_of_callbacks), fitting.ledger, params)

    def _run(self, fitting: Fitting, show: Show, params: dict[str, Any]) -> tuple[dict[str, list[float]], list[int]]:
        self.stop_training = False
        # A step of somebody else may have left gradients, as those of Keras do.
        fitting.plan.optimizer.zero_grad(set_to_none=True)
        callbacks = fitting.options.callbacks
        for callback in callbacks:
            callback.set_model(self)
            callback.set_params(params)
            callback.on_train_begin({})
        try:
            with show, training(self.net), memory.kept(fitting.device):
                return fitting.run(show)
        except NonFiniteError as error:
            fitting.record(error)
            raise
        finally:
            fitting.average.install()
            for callback in callbacks:
                callback.on_train_end({})

    # --- evaluate and predict ----------------------------------------------------------------------------------

    @sharing.on_all_ranks
    def evaluate(
        self,
        x: Any,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        mask: Any = None,
        steps: int | None = None,
        return_dict: bool = False,
        samples: bool = False,
        groups: Mapping[str, Any] | None = None,
        spread: bool = False,
    ) -> Any:
        """The loss and the metrics of data, the same for every batch size.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            batch_size: as in `fit`.
            verbose: as in `fit`.
            sample_weight: as in `fit`.
            mask: as in `fit`.
            steps: number of batches, if not all.
            return_dict: return numbers by name.
            samples: as in `fit`; in `model.ledger.samples`.
            groups: as in `fit`.
            spread: as in `fit`.

        Returns:
            the loss, or a list of the loss and the other numbers, or a dict.
        """
        batch_size = boundary.batch_size_of(batch_size, x)
        boundary.check_pass(steps)
        self._require_compiled()
        data = self._built(make_data(x, y, sample_weight, mask, self._dtype(), groups))
        plan, group, device = self._compiled().plan, self._group(), self._device()
        assumed = boundary.check_targets(plan, data, device, self._compiled().known_to(group))
        sharing.check_shared(group, plan.objective, {"x": data}, batch_size=batch_size, steps=steps)
        with Show(verbose if group.rank == 0 else 0) as show:
            kept = numbering(data, group, again=False) if check_samples(samples) else None
            metrics = self._compiled().metrics
            result = evaluated(plan, metrics, data, batch_size, steps, show, device, group, kept, bool(spread), assumed)
            show.end("evaluate", result.steps, result.seconds, result.logs)
        self.ledger = Ledger("evaluate", provenance(plan, None, batch_size, ranks=group.size))
        post(self.ledger, plan.objective, result, "test", 0, group)
        return as_keras(result.logs, return_dict)

    @sharing.on_all_ranks
    def predict(self, x: Any, batch_size: int | None = None, verbose: Any = 0, steps: int | None = None) -> Any:
        """What the model returns, as NumPy arrays in the structure of its outputs.

        A number without a batch axis beside the outputs comes as one value a batch.

        Args:
            x: inputs, or an iterable of inputs or of batches `(x, y)`.
            batch_size: as in `fit`.
            verbose: as in `fit`.
            steps: number of batches, if not all.
        """
        batch_size = boundary.batch_size_of(batch_size, x)
        boundary.check_pass(steps)
        autocast = None if self._settings is None else self._settings.autocast
        return prediction.predict(
            self.net, self._forward.call, x, batch_size, steps, autocast, self._device(), self._dtype()
        )

    # --- single batches ----------------------------------------------------------------------------------------

    @sharing.on_all_ranks
    def train_on_batch(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        mask: Any = None,
        class_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """One step on one batch; the numbers are of this batch, at the weights before the step.

        Several ranks pass the same batch, of which each takes its share.
        """
        settings = self._require_compiled()
        data = array_data(x, y, sample_weight, mask, self._dtype())
        self._built(data)
        plan = self._compiled().weighted(class_weight)
        optimizers.check_trainable(plan.parameters)
        plan.optimizer.zero_grad(set_to_none=True)
        current = self._single(plan.objective)
        with training(self.net):
            result = loop.train_single(plan, data, current, settings.on_nonfinite == "raise")
        return as_keras(result.logs, return_dict)

    @sharing.on_all_ranks
    def test_on_batch(
        self, x: Any, y: Any, sample_weight: Any = None, mask: Any = None, return_dict: bool = False
    ) -> Any:
        """The loss and the metrics of one batch."""
        self._require_compiled()
        data = array_data(x, y, sample_weight, mask, self._dtype())
        self._built(data)
        plan = self._compiled().plan
        result = loop.evaluate_pass(plan, data, data.length, None, self._single(plan.objective), checked=False)
        return as_keras(result.logs, return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """What the model returns for one batch, as NumPy arrays."""
        data = array_data(x, dtype=self._dtype())
        return self.predict(data.x, batch_size=data.length)

    # --- inside ------------------------------------------------------------------------------------------------

    def _single(self, objective: Objective) -> sums.Pass:
        return sums.Pass(objective, self._compiled().metrics, self._device(), Show(0), self._group())
