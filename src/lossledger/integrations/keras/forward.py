"""A Keras model, or a torch module that holds layers of Keras, as training uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import torch
from keras.src.backend.common import global_state
from keras.src.layers.layer import CallContext
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger import regularizers
from lossledger.errors import InputError
from lossledger.forward import Forward, Recipe, calling
from lossledger.integrations.keras import optimizers, outputs, tree
from lossledger.objective import add_loss


class KerasForward(Forward):
    """What is different for layers of Keras.

    * `train()` and `eval()` do nothing to them: each call is told whether it trains.
    * Parameters exist once a batch has been seen.
    * `add_loss` and activity regularizers leave scalars on the layers; regularizers and constraints are on variables.
    * Running statistics and the state of seeds are parameters without a gradient, not buffers.

    Args:
        net: a layer of Keras, or a torch module with such layers in it.

    Raises:
        InputError: a model that FSDP2 has sharded.
    """

    def __init__(self, net: nn.Module) -> None:
        tree.refuse_sharded(net)
        self._is_keras = isinstance(net, keras.layers.Layer)
        self._roots = [root for _, root in tree.roots(net)]
        self._layers: list[Any] = []
        self._constraints: Any = None
        super().__init__(net)

    def __reduce__(self) -> str:
        # Keras copies a layer by its configuration: the optimizer would go on with variables of neither model.
        raise InputError(
            "A Model around layers of Keras was to be copied or pickled; expected one around a torch module. Copy the "
            "network, keras.models.clone_model(net), compile a new Model of it, and bring the weights there by "
            "save_weights and load_weights."
        )

    # --- a call ------------------------------------------------------------------------------------------------

    def _caller(self) -> Callable[[Any], Any]:
        run = self._run_keras if self._is_keras else self._nested(calling(self.net))

        def call(x: Any) -> Any:
            if not self.built:
                self.build(x)
            found = run(x)
            self._add_losses()
            return found

        return call

    def _run_keras(self, x: Any) -> Any:
        # A model of Keras takes one argument, whatever its structure.
        return self.net(x, training=self.net.training)

    def _nested(self, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            with _outer_call(self._roots, self.net.training):
                return plain(x)

        return run

    def _add_losses(self) -> None:
        """The scalars that this call left on the layers, as auxiliary losses by the paths of the layers."""
        if not self._layers:
            self._layers = tree.layers(self.net)
        names: dict[str, int] = {}
        for layer in self._layers:
            for value in layer._get_own_losses():
                name = f"{layer.path or layer.name}/add_loss"
                count = names[name] = names.get(name, 0) + 1
                number = value if value.is_floating_point() else value.float()
                add_loss(name if count == 1 else f"{name}_{count}", number.sum())

    # --- before training ---------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the layers have seen a batch."""
        return all(root.built for root in self._roots)

    def build(self, x: Any) -> None:
        """Make the variables by a call in inference, which changes nothing else."""
        # Parameters that are made in inference mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            if self._is_keras:
                self.net(x, training=False)
            else:
                with _outer_call(self._roots, False):
                    calling(self.net)(x)
        self._layers = []

    def understood(self, recipe: Recipe) -> Recipe:
        """Outputs by their names, and the regularizers of the variables as terms of their own."""
        return outputs.understood(recipe, self.net, self._regularizers())

    def _regularizers(self) -> dict[str, Any]:
        if not self.built:
            return {}
        return {
            _literal(path): _Regularizer.of(variable.regularizer)
            for path, variable in tree.variables(self.net).items()
            if variable.trainable and variable.value.requires_grad and variable.regularizer is not None
        }

    def optimizer(self, given: Any) -> Any:
        """A name or an optimizer of Keras as an optimizer of torch that makes the same steps."""
        return optimizers.understood(given, self.net)

    def check(self, precision: str) -> None:
        """Precisions that do not do for Keras what they say.

        Raises:
            InputError: autocast, or a dtype policy that needs a scaled loss.
        """
        tree.refuse_sharded(self.net)
        if self._is_keras and precision != "float32":
            raise InputError(
                f"precision: layers of Keras cast the results of autocast back to float32, so {precision!r} would cost "
                "accuracy and save nothing; expected 'float32'. Build the model under "
                "keras.config.set_dtype_policy('mixed_bfloat16')."
            )
        for root in self._roots:
            if getattr(root, "compute_dtype", None) == "float16":
                raise InputError(
                    f"The model {root.name!r} calculates in float16, whose small gradients vanish without a scaled "
                    "loss, which lossledger does not have; expected float32 or bfloat16. Build it under "
                    "keras.config.set_dtype_policy('mixed_bfloat16')."
                )

    # --- the tensors -------------------------------------------------------------------------------------------

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters by the paths of their variables."""
        return tree.parameters(self.net)

    def running(self) -> list[Tensor]:
        """Running statistics: variables that no layer trains, and buffers of torch modules."""
        found = [variable.value for layer in tree.layers(self.net) for variable in layer._non_trainable_variables]
        found += [buffer for root in self._roots for _, buffer in tree.buffers(root)]
        found += super().running()
        # A module that is registered at several places is one.
        return [value for value in {id(value): value for value in found}.values() if value.is_floating_point()]

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics, seeds and buffers, by position and name."""
        self._require_built()
        return tree.state(self.net)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put such a state in place."""
        self._require_built()
        own = tree.state(self.net)
        for name in [*own, *state]:
            if name not in own or name not in state:
                raise InputError(
                    f"Expected the variables of the same architecture in the same order; {name!r} is "
                    f"{'not in the file' if name in own else 'not in the model'}."
                )
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise InputError(f"{name}: expected shape {tuple(value.shape)}, received {tuple(state[name].shape)}.")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def everything(self) -> dict[str, Tensor]:
        """The state: it leaves nothing out that a forward changes."""
        return self.state()

    def put_back(self, everything: Mapping[str, Tensor]) -> None:
        """Put back what `everything` told."""
        self.load(everything)

    def _require_built(self) -> None:
        if not self.built:
            raise InputError(
                "The Keras model has no weights before it has seen a batch; expected a built model. Call it once, "
                "model.predict(x[:1]), or begin it with keras.Input."
            )

    def parts(self) -> list[tuple[str, str, list[nn.Parameter]]]:
        """The layers of Keras and the other modules that hold parameters."""
        return tree.parts(self.net)

    def summary(self) -> str | None:
        """Keras's own table."""
        if not isinstance(self.net, keras.Model):
            return None
        lines: list[str] = []
        self.net.summary(line_length=80, print_fn=lambda line, **_: lines.append(str(line)))
        return "\n".join(line.rstrip() for part in lines for line in part.splitlines())

    # --- after a step ------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> None:
        """Apply the constraints of the variables after each step, as Keras's optimizers do by themselves."""
        if self._constraints is not None:
            self._constraints.remove()
            self._constraints = None
        constrained = [v for v in tree.variables(self.net).values() if v.constraint is not None and v.trainable]
        if constrained and not isinstance(optimizer, optimizers.Applied):
            self._constraints = optimizer.register_step_post_hook(_constraining(constrained))


@contextlib.contextmanager
def _outer_call(roots: list[Any], training: bool) -> Iterator[None]:
    """A call of Keras around calls of its layers, which tells them whether they train, as an outer layer would."""
    for root in roots:
        # Done by the outermost layer when a call begins, and here none of them is the outermost.
        root._clear_losses()
    context = CallContext(entry_layer=None)
    context.set_value("training", training)

    def done(module: nn.Module, inputs: Any, output: Any) -> None:
        # A layer that was told otherwise has told the context, and the next one is none of its own.
        context.set_value("training", training)

    hooks = [root.register_forward_hook(done) for root in roots]
    before = global_state.get_global_attribute("current_call_ctx")
    global_state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", before)
        for hook in hooks:
            hook.remove()


def _constraining(variables: list[Any]) -> Callable[..., None]:
    def constrain(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Set while a step runs that may be left out because it is not finite: then nothing may change.
        bad = getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            for variable in variables:
                value = variable.value
                wanted = variable.constraint(value)
                value.copy_(wanted if bad is None else torch.where(bad.bool(), value, wanted))

    return constrain


def _literal(path: str) -> str:
    """The path as a pattern that only matches itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


class _Regularizer(regularizers.Regularizer):
    """A regularizer of Keras that the library does not have, or a function."""

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = regularizer
        kind = type(regularizer).__name__
        self.name = getattr(regularizer, "__name__", kind) if kind == "function" else kind.lower()

    @classmethod
    def of(cls, regularizer: Any) -> regularizers.Regularizer:
        """The library's regularizer of the same formula, or this one around Keras's."""
        if type(regularizer) is keras.regularizers.L2:
            return regularizers.L2(float(regularizer.l2))
        if type(regularizer) is keras.regularizers.L1:
            return regularizers.L1(float(regularizer.l1))
        if type(regularizer) is keras.regularizers.L1L2:
            return regularizers.L1L2(float(regularizer.l1), float(regularizer.l2))
        return cls(regularizer)

    def __call__(self, weight: Tensor) -> Tensor:
        penalty: Tensor = self.regularizer(weight)
        return penalty

    def __repr__(self) -> str:
        return f"keras:{self.name}"
