"""24 samples, a batch size of 1: why the number of the progress bar is not the loss of the last batch.

What to see: for some steps, `last` (the loss of that batch alone, here one sample) jumps about, while `moving` (the
total of the epoch so far over its count) moves slowly. The number that stays at the end of the epoch is the last
`moving` one. `frozen` is the loss of the same 24 samples when the weights stand still.
"""

import torch

import lossledger as ll


class Watch(ll.callbacks.Callback):
    """Prints the moving number beside the last one, which follows from two moving numbers."""

    def on_epoch_begin(self, epoch: int, logs: ll.callbacks.Logs) -> None:
        self.total = 0.0

    def on_train_batch_end(self, batch: int, logs: ll.callbacks.Logs) -> None:
        total = logs["loss"] * (batch + 1)
        last, self.total = total - self.total, total
        if batch % 4 == 3:
            print(f"step {batch + 1:2}  last {last:8.4f}  moving {logs['loss']:8.4f}")


def main() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 24).reshape(-1, 1)
    y = 3 * x + 1

    model = ll.Model(torch.nn.Linear(1, 1))
    model.compile(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), loss="mse")
    history = model.fit(x, y, batch_size=1, epochs=1, verbose=0, seed=0, callbacks=[Watch()])
    print(f"printed for the epoch: {history.history['loss'][0]:.4f}, the last moving number")

    frozen = [model.evaluate(x, y, batch_size=size, verbose=0) for size in (1, 5, 24)]
    print("frozen, with batch sizes 1, 5 and 24: " + ", ".join(f"{loss:.4f}" for loss in frozen))
    print(
        "last and moving differ: last is one sample at the newest weights, moving is the mean over all samples so\n"
        "far, each at the weights of its own step. Early steps with bad weights stay in it until the epoch ends."
    )


if __name__ == "__main__":
    main()
