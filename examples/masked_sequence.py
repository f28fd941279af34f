"""Padded sequences with a mask: the loss does not depend on how the sequences were put into batches.

Seven sequences of 1 to 7 steps, padded to 7 with NaN. What to see: padded steps count neither in the loss nor in its
divisor, whatever they hold, and `evaluate` gives the same number for batch sizes 1, 2, 5 and all at once. The mean of
batch means, which loops often print, is another number for every batch size.
"""

import torch

import lossledger as ll

LENGTHS = [7, 2, 4, 1, 6, 3, 5]


def main() -> None:
    torch.manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    x = torch.randn(len(LENGTHS), max(LENGTHS), 2)
    y = (x.sum(-1, keepdim=True) + 1).masked_fill(~mask.unsqueeze(-1), float("nan"))

    model = ll.Model(torch.nn.Linear(2, 1))
    model.compile(loss="mse")
    model.fit(x, y, mask=mask, batch_size=2, epochs=3, verbose=0, seed=0)

    print(f"{int(mask.sum())} of {mask.numel()} steps count")
    losses = {}
    for size in (1, 2, 5, len(x)):
        losses[size] = model.evaluate(x, y, mask=mask, batch_size=size, verbose=0)
        batches = [slice(start, start + size) for start in range(0, len(x), size)]
        means = [model.test_on_batch(x[b], y[b], mask=mask[b]) for b in batches]
        print(f"batch size {size}: loss {losses[size]:.6f}, mean of batch means {sum(means) / len(means):.6f}")
    spread = max(losses.values()) - min(losses.values())
    print(f"the same loss for every batch size: {spread < 1e-6}")


if __name__ == "__main__":
    main()
