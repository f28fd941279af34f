"""Two outputs with weights, and a regularizer: what the total is made of.

What to see: the breakdown of one batch (each term is λ × value, and the contributions add up to the total exactly, from
left to right), then the same for an epoch of training, read from the ledger.
"""

import torch

import lossledger as ll


class House(torch.nn.Module):
    """A price and whether it was sold, from a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = torch.nn.Linear(4, 8)
        self.price = torch.nn.Linear(8, 1)
        self.sold = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.shared(x))
        return {"price": self.price(hidden), "sold": self.sold(hidden)}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = {"price": x.sum(1, keepdim=True), "sold": (x[:, :1] > 0).float()}

    net = House()
    model = ll.Model(net)
    model.compile(
        loss={"price": "mse", "sold": ll.losses.BinaryCrossentropy(from_logits=True)},
        loss_weights={"price": 0.5, "sold": 2.0},
        regularizers={"*.weight": ll.regularizers.L2(0.01)},
    )

    breakdown = model.objective(y, net(x), model=net)
    print("before training:")
    print(breakdown)
    contributions = sum(term.contribution for term in breakdown.terms.values())
    print(f"the contributions sum to the total: {bool(contributions == breakdown.total)}")

    history = model.fit(x, y, epochs=5, verbose=0, seed=0)
    print("\nepoch 5, from the ledger:")
    table = history.ledger.table(by=["term"], split="training", epoch=5)
    for row in table:
        print(f"{row['term']:<26}{row['contribution']:8.4f}{row['share']:7.1%}")
    loss = history.history["loss"][-1]
    print(f"{'printed loss':<26}{loss:8.4f}")
    print(f"the ledger's loss is the printed loss: {history.ledger.loss('training', 5) == loss}")


if __name__ == "__main__":
    main()
