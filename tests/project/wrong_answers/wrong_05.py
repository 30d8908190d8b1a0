"""Planted mistakes for the checks of notebook 05."""

import torch

LEVELS = torch.tensor([-1.5, -0.5, 0.5, 1.5])


def nearest_level(t):
    return LEVELS[(LEVELS - t).abs().argmin()]


def a_sum_instead_of_a_mean(X):
    return X.T @ X


def a_covariance(X):
    centred = X - X.mean(0)
    return centred.T @ centred / len(X)


def between_tokens(X):
    return X @ X.T / len(X)


def plain_distance(t, words, C_kk):
    return int((t - words).square().sum(1).argmin())


def transposed_metric(t, words, C_kk):
    return int(((t - words) @ C_kk.T).square().sum(1).argmin())


def the_codeword_instead_of_its_index(t, words, C_kk):
    return words[((t - words) @ C_kk).square().sum(1).argmin()]


def no_feedback(w, H):
    return torch.stack([nearest_level(value) for value in w])


def from_the_back(w, H):
    C, w_hat = torch.linalg.cholesky(H), torch.zeros_like(w)
    for k in reversed(range(len(w))):
        w_hat[k] = nearest_level(w[k] + (w[k + 1 :] - w_hat[k + 1 :]) @ C[k + 1 :, k] / C[k, k])
    return w_hat


def H_not_flipped(w, H):
    return from_the_back(w.flip(0), H).flip(0)


def not_flipped_back(w, H):
    return from_the_back(w.flip(0), H.flip(0, 1))


WRONG = {
    "second_moment": [a_sum_instead_of_a_mean, a_covariance, between_tokens],
    "nearest_in_metric": [plain_distance, transposed_metric, the_codeword_instead_of_its_index],
    "feedback_from_the_front": [no_feedback, from_the_back, H_not_flipped, not_flipped_back],
}
