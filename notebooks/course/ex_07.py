"""Checks of notebook 07: decode a matrix, predict the memory of training, rotate activations instead of weights."""

import torch

from lcqat_min.layer.rotation import hadamard, random_signs

from .exercise import Wrong, exercise, expect_close


@exercise
def decode_latents(answer):
    """Against loops on matrices with out != n, d != k and a latent of exactly zero."""
    for rows, vectors, d, k in ((1, 1, 2, 4), (3, 2, 4, 8), (2, 5, 1, 2)):
        generator = torch.Generator().manual_seed(7)
        latent = torch.randn(rows, vectors * k, generator=generator)
        latent[0, 0] = 0.0
        A, b = torch.randn(d, k, generator=generator), torch.randn(d, generator=generator)
        before = latent.clone()
        got = answer(latent, A, b)
        if not torch.equal(latent, before):
            raise Wrong("Your function changes the latents that it is given. Make a new tensor.")
        wanted = torch.tensor(
            [
                [
                    float(b[i] + sum(A[i, j] * (1.0 if latent[o, g * k + j] >= 0 else -1.0) for j in range(k)))
                    for g in range(vectors)
                    for i in range(d)
                ]
                for o in range(rows)
            ]
        )
        expect_close(got, wanted, f"D for latents {list(latent.shape)} (the first is exactly 0) and A {list(A.shape)}")


@exercise
def latent_bytes(answer):
    """Widths that d divides, and such as it does not."""
    sizes = ((2, 8, 2, 4), (256, 256, 4, 8), (6, 10, 4, 8), (5, 7, 1, 1), (3, 9, 8, 16))
    for (rows, inputs, d, k), wanted in zip(sizes, (512, 2_097_152, 2304, 560, 1536), strict=True):
        got = answer(rows, inputs, d, k)
        if got != wanted:
            raise Wrong(
                f"For a [{rows}, {inputs}] layer with d = {d} and k = {k} you say {got} bytes; {wanted} is right. "
                "Count vectors in a row (rounded up), digits in a vector, and four fp32 numbers for each latent."
            )


@exercise
def apply_codes(answer):
    """Against the dense weight, written with whole Hadamard matrices."""
    for out, n in ((2, 8), (16, 4), (8, 8)):
        generator = torch.Generator().manual_seed(70)
        x, D = torch.randn(3, n, generator=generator), torch.randn(out, n, generator=generator)
        r, c = 0.5 + torch.rand(out, generator=generator), 0.5 + torch.rand(n, generator=generator)
        s_in, s_out = random_signs(n, generator), random_signs(out, generator)
        W_hat = s_out[:, None] * (hadamard(out) @ (r[:, None] * D) @ hadamard(n)) * (s_in * c)
        expect_close(answer(x, D, r, c, s_in, s_out), x @ W_hat.T, f"y for D {list(D.shape)}", 1e-3)
