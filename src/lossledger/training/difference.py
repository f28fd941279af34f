"""`gap`: what makes training loss and validation loss differ at the weights as they are, outside of `fit`."""

from __future__ import annotations

from typing import Any

from lossledger.batch import to_device
from lossledger.errors import InputError
from lossledger.training import boundary
from lossledger.training.data import ArrayData, make_data, order_of
from lossledger.training.fitting import evaluated
from lossledger.training.gap import (
    Chosen,
    Measuring,
    Plain,
    check_measurable,
    of_augmentation,
    of_weights,
    undisturbed,
    weighs,
)
from lossledger.training.model import Model
from lossledger.training.modes import training
from lossledger.training.progress import Show
from lossledger.training.waterfall import Waterfall, waterfall


def gap(
    model: Model,
    x: Any,
    y: Any = None,
    validation_data: Any = None,
    batch_size: int | None = None,
    batches: int = 8,
    sample_weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
    plain: Plain | None = None,
    seed: int = 0,
) -> Waterfall:
    """What makes the loss of training data differ from that of validation data, at the weights as they are.

    The way starts at the loss of some training batches in train mode, as a training step would print it. Of the loss
    that an epoch printed while its weights changed, `callbacks.Gap` tells more.

    Args:
        model: compiled.
        x: training inputs, as in `fit`.
        y: as in `fit`.
        validation_data: as in `fit`.
        batch_size: of both, where they are arrays, as in `fit`.
        batches: how many training batches to measure, from all over the data.
        sample_weight: as in `fit`.
        mask: as in `fit`.
        class_weight: as in `fit`.
        plain: as of `callbacks.Gap`.
        seed: of the order of arrays.

    Returns:
        a `Waterfall`. Weights, running statistics and random state are as before.

    Raises:
        InputError: no validation data; several ranks; fewer than 2 batches.

    Example:
        >>> import lossledger as ll, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 4)
        >>> model = ll.Model(torch.nn.Linear(4, 1))
        >>> model.compile("adam", "mse")
        >>> found = gap(model, x, x.sum(1), (x[:64], x[:64].sum(1)))
        >>> found["train mode"].value, found["counting"].value
        (0.0, 0.0)
    """
    check_measurable(model.net, "gap")
    batch_size = boundary.batch_size_of(batch_size, x, validation_data)
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 2:
        raise InputError(f"gap: expected a whole number from 2 for batches, received {batches!r}.")
    if validation_data is None:
        raise InputError("gap: expected validation_data, received None. Pass what fit takes, such as (x, y).")
    group, device, dtype = model._group(), model._device(), model._dtype()
    if group.size > 1:
        raise InputError(f"gap: expected one process, received {group.size} ranks. In fit, callbacks.Gap serves them.")
    data = model._built(make_data(x, y, sample_weight, mask, dtype))
    data, held = boundary.validation(data, 0.0, validation_data, dtype)
    assert held is not None
    compiled = model._compiled()
    plan = compiled.weighted(class_weight)
    with undisturbed(model.net, device):
        order = order_of(data.length, seed, 0) if data.length is not None else None
        chosen = Chosen(batches, data.steps(batch_size))
        for step, batch in enumerate(data.batches(batch_size, order)):
            unit = chosen.unit(step)
            if unit is not None:
                unit.batches.append(to_device(batch, device))
        result = evaluated(compiled.plan, (), held, batch_size, None, Show(0), device, group)
        weighted = weighs(compiled.plan.objective, held, result.tallies)
        with training(model.net):
            units = Measuring(plan, compiled.plan, device, plain, weighted).units(chosen.units)
    if not units:
        raise InputError("gap: expected training batches with a finite loss, received none.")
    missing = of_augmentation(plain, isinstance(data, ArrayData))
    return waterfall(plan.objective, units, None, result.tallies, None, missing, of_weights(weighted))
