"""A custom loss that returns a scalar: the sum of squares of a batch.

1,000 samples with 3 inputs, `y = 10·x + 2.5` for each of the 3 outputs, Adam at 0.1, 20 epochs. What to see:

- the loss falls to nearly 0, and the weights come out as 10 times the identity, the bias as 2.5;
- a scalar needs no per-sample values to train with. `scalar="sum"` says what it stands for, so the number of an epoch
  is the sum over its batches; without it, a scalar is taken as the mean of its batch.
"""

import torch

import lossledger as ll


def sum_of_squares(y_true: torch.Tensor, y_pred: torch.Tensor) -> torch.Tensor:
    return (y_true - y_pred).square().sum()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 3)
    y = 10 * x + 2.5

    net = torch.nn.Linear(3, 3)
    model = ll.Model(net)
    model.compile(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        loss=ll.losses.FunctionLoss(sum_of_squares, scalar="sum"),
    )
    history = model.fit(x, y, batch_size=32, epochs=20, verbose=0, seed=0)

    losses = history.history["loss"]
    print(f"sum of squares in epoch 1: {losses[0]:.4g}, in epoch 20: {losses[-1]:.4g}")
    print("weights, near 10 times the identity:")
    for row in net.weight.tolist():
        print("  " + "  ".join(f"{value:7.3f}" for value in row))
    print("bias, near 2.5:")
    print("  " + "  ".join(f"{value:7.3f}" for value in net.bias.tolist()))


if __name__ == "__main__":
    main()
