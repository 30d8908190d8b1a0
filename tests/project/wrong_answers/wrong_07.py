"""Mistakes that the checks of notebook 07 must catch."""

import torch

from lcqat_min.layer.rotation import rotate, unrotate


def sign_of_zero(latent, A, b):
    q = torch.sign(latent).view(len(latent), -1, A.shape[1])
    return (q @ A.T + b).flatten(1)


def forgets_the_offset(latent, A, b):
    q = torch.where(latent >= 0, 1.0, -1.0).view(len(latent), -1, A.shape[1])
    return (q @ A.T).flatten(1)


def keeps_vectors_apart(latent, A, b):
    q = torch.where(latent >= 0, 1.0, -1.0).view(len(latent), -1, A.shape[1])
    return q @ A.T + b


def decodes_the_latents(latent, A, b):
    return (latent.view(len(latent), -1, A.shape[1]) @ A.T + b).flatten(1)


def forgets_the_padding(rows, inputs, d, k):
    return 16 * rows * inputs * k // d


def forgets_adam(rows, inputs, d, k):
    return 8 * rows * -(-inputs // d) * k


def counts_weights(rows, inputs, d, k):
    return 16 * rows * inputs


def scales_after_mixing(x, D, r, c, s_in, s_out):
    return unrotate((rotate(x, s_in) * c @ D.T) * r, s_out)


def unrotates_the_inputs(x, D, r, c, s_in, s_out):
    return unrotate((unrotate(x * c, s_in) @ D.T) * r, s_out)


def scales_outside(x, D, r, c, s_in, s_out):
    return unrotate(rotate(x * c, s_in) @ D.T, s_out) * r


def rotates_the_outputs(x, D, r, c, s_in, s_out):
    return rotate((rotate(x * c, s_in) @ D.T) * r, s_out)


WRONG = {
    "decode_latents": [sign_of_zero, forgets_the_offset, keeps_vectors_apart, decodes_the_latents],
    "latent_bytes": [forgets_the_padding, forgets_adam, counts_weights],
    "apply_codes": [scales_after_mixing, unrotates_the_inputs, scales_outside, rotates_the_outputs],
}
