"""Checks of notebook 02: nearest codeword by products, means of cells, the dimension one can pay for."""

import torch

from .exercise import Wrong, exercise, expect_close


@exercise
def nearest_by_products(answer):
    generator = torch.Generator().manual_seed(2)
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    x = torch.tensor([[1.2, 0.1], [0.2, 1.4], [0.4, -0.3], [0.5, 2.0]])
    shown = [[round(v, 1) for v in vector] for vector in x.tolist()]
    _expect_indices(answer(x, table), [1, 0, 0, 2], f"codewords {table.tolist()}, vectors {shown}")
    for size, dim in ((5, 1), (16, 2), (64, 4)):
        table, x = torch.randn(size, dim, generator=generator), torch.randn(50, dim, generator=generator)
        wanted = [min(range(size), key=lambda k: (v - table[k]).square().sum().item()) for v in x]
        _expect_indices(answer(x, table), wanted, f"{size} random codewords of dimension {dim}")


def _expect_indices(got: object, wanted: list[int], case: str) -> None:
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"The result is a {type(got).__name__}; a tensor of {len(wanted)} indices is wanted.")
    if got.shape != (len(wanted),):
        raise Wrong(
            f"The result has shape {list(got.shape)}; one index a vector, [{len(wanted)}], is wanted. "
            "Along which dimension do you take the argmax?"
        )
    if (off := (got != torch.tensor(wanted)).nonzero().flatten()).numel():
        n = off[0].item()
        raise Wrong(
            f"With {case}: vector {n} is nearest to codeword {wanted[n]}, you return {got[n].item()}. "
            "The largest score wins. Long codewords have large products: half of |w|^2 has to come off."
        )


@exercise
def cell_means(answer):
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    table = torch.tensor([[0.0, 0.0], [9.0, 9.0], [4.0, 4.0]])
    index = torch.tensor([0, 0, 2])
    got = answer(x.clone(), index, table.clone())
    if isinstance(got, torch.Tensor) and got.shape == table.shape and not torch.equal(got[1], table[1]):
        raise Wrong(f"Codeword 1 serves no vector and should stay at [9, 9]; you return {got[1].tolist()}.")
    expect_close(
        got,
        torch.tensor([[2.0, 1.0], [9.0, 9.0], [5.0, 5.0]]),
        "the table after vectors [1, 0] and [3, 2] went to codeword 0, [5, 5] to codeword 2",
    )
    generator = torch.Generator().manual_seed(3)
    x, index = torch.randn(200, 4, generator=generator), torch.randint(0, 20, (200,), generator=generator)
    wanted = torch.stack([x[index == k].mean(0) for k in range(20)])
    expect_close(answer(x, index, torch.zeros(20, 4)), wanted, "the table of 200 random vectors and 20 codewords")


@exercise
def largest_dimension(answer):
    small = 256**2
    cases = [
        (small, 0.25, 4),
        (small, 0.24, 3),
        (small, 128.0, 8),
        (small, 0.0001, 0),
        (4096**2, 0.1, 6),
        (256, 2.0, 2),
    ]
    for weights, budget, wanted in cases:
        got = answer(weights, budget)
        if got is None:
            raise Wrong("The result is None: does the function return d?")
        if got != wanted:
            d = got if isinstance(got, int) and wanted < got < 20 else max(1, wanted)  # too dear, or affordable
            raise Wrong(
                f"For {weights} weights and {budget} bits per weight {wanted} is right; you return {got}. The "
                f"table of d = {d} has {d} x {4**d} numbers of 16 bits: {16 * d * 4**d / weights:.4g} bits a "
                "weight."
            )
