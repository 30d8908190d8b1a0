"""The loss of distillation: how far the student's next-token probabilities are from the teacher's.

    loss = mean over tokens of KL(p_t || p_s) = sum_v p_t (log p_t - log p_s)       nats; p = softmax(logits [V])
    d loss / d logits of the student = (p_s - p_t) / tokens

The gradient falls out of the same pass, so it is made there, in slices of KL_ELEMENTS logits: autograd would keep
several copies of all logits, which for a vocabulary of 150 000 are the largest tensors of a step.

Limits: no second derivatives, and no gradient to the teacher.
"""

import torch
from torch import Tensor

from ..errors import UsageError

KL_ELEMENTS = 1 << 25  # logits compared at a time: 128 MiB of fp32


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) over tokens, nats: logits [..., V] -> scalar with gradient to `student`."""
    if student.shape[-1] != teacher.shape[-1]:
        sizes = f"{student.shape[-1]} and {teacher.shape[-1]} logits"
        raise UsageError(f"student and teacher differ in vocabulary: {sizes}; distil from the unquantized model")
    return _TeacherKL.apply(student.flatten(0, -2), teacher.flatten(0, -2))


class _TeacherKL(torch.autograd.Function):
    """Loss and gradient in one pass over slices of tokens: d loss / d logits = (p_s - p_t) / tokens.

    The division waits for backward: fp16 has no numbers below 6e-8, and a loss scaler multiplies only then.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits [tokens, V] of both -> their mean KL(teacher || student), nats, fp32 scalar."""
        grad = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        rows = max(1, KL_ELEMENTS // student.shape[1])
        for s, t, g in zip(student.split(rows), teacher.split(rows), grad.split(rows), strict=True):
            log_s, log_t = s.float().log_softmax(1), t.float().log_softmax(1)
            p_t = log_t.exp()
            total += ((log_t - log_s) * p_t).sum().double()
            g.copy_(log_s.exp() - p_t)
        ctx.save_for_backward(grad)
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """Gradient to the student's logits, in their dtype; none to the teacher's."""
        (grad,) = ctx.saved_tensors
        return grad * (upstream / len(grad)), None
