"""The loss of distillation against torch's own, in value and gradient, in three dtypes."""

import pytest
import torch
import torch.nn.functional as F

from lcqat_min.qat import loss as distillation
from lcqat_min.qat.loss import distillation_loss


@pytest.mark.parametrize("elements", [1 << 25, 1, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_distillation_loss_is_kl_div(generator, monkeypatch, dtype, tolerance, elements):
    monkeypatch.setattr(distillation, "KL_ELEMENTS", elements)
    student, teacher = (3 * torch.randn(2, 5, 19, generator=generator).to(dtype) for _ in range(2))
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    log_t, log_s = (logits.flatten(0, 1).double().log_softmax(1) for logits in (teacher, exact))
    expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    (3 * expected).backward()
    loss = distillation_loss(student, teacher)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2 * tolerance, atol=tolerance * 0.1)


def test_distillation_gradients_survive_fp16_under_a_loss_scaler(generator):
    student = torch.randn(2000, 64, generator=generator).half().requires_grad_()
    loss = distillation_loss(student, torch.zeros(2000, 64, dtype=torch.float16))
    (2.0**12 * loss).backward()
    probability = student.detach().float().softmax(1)
    expected = (probability - 1 / 64) / 2000 * 2.0**12
    torch.testing.assert_close(student.grad.float(), expected, rtol=2e-3, atol=1e-5)
