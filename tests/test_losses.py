"""The DynamicViT objective against its closed forms."""
import math

import pytest
import torch
import torch.nn.functional as F

from vitprune import PrunedOutput
from vitprune.losses import DynamicViTLoss, distillation_loss, ratio_loss, token_loss


def test_ratio_loss_is_the_squared_distance_of_each_pictures_mean():
    decisions = [torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])]
    expected = (((0.5 - 0.7) ** 2 + (1 - 0.7) ** 2) / 2 + ((0.25 - 0.49) ** 2 + 0.49 ** 2) / 2) / 2
    assert ratio_loss(decisions, [0.7, 0.49]).item() == pytest.approx(expected, rel=1e-6)


def test_ratio_loss_gradient():
    decision = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    ratio_loss([decision], [0.5]).backward()
    torch.testing.assert_close(decision.grad, torch.full((1, 4), 2 * (0.25 - 0.5) / 4, dtype=torch.float64))


def test_ratio_loss_refuses_another_number_of_stages():
    with pytest.raises(ValueError, match=r"ratio_loss: decisions must have one entry per keep ratio \(3\), got 1"):
        ratio_loss([torch.ones(1, 4)], [0.7, 0.5, 0.3])


def test_distillation_loss_is_the_divergence_from_the_teacher():
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[math.log(3), 0.0], [1.0, 2.0]])
    expected = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2  # the second picture adds nothing
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_token_loss_is_the_error_over_kept_tokens():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    keep = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(token_loss(student, teacher, keep), F.mse_loss(student[keep > 0], teacher[keep > 0]))
    torch.testing.assert_close(token_loss(student, teacher, None), F.mse_loss(student, teacher))


def test_token_loss_matches_tokens_that_have_left_by_their_place():
    student, teacher = torch.randn(2, 2, 4), torch.randn(2, 5, 4)
    keep = torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    expected = F.mse_loss(student, torch.stack([teacher[0, [1, 3]], teacher[1, [0, 4]]]))
    torch.testing.assert_close(token_loss(student, teacher, keep), expected)


def test_token_loss_is_zero_with_zero_gradient_where_no_token_is_kept():
    student = torch.randn(2, 5, 4, requires_grad=True)
    loss = token_loss(student, torch.randn(2, 5, 4), torch.zeros(2, 5))
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_dropped_tokens_get_no_gradient():
    student, teacher = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    token_loss(student, teacher, torch.tensor([[1.0, 0, 1]])).backward()
    assert student.grad[0, 1].abs().max() == 0 and student.grad[0, [0, 2]].abs().min() > 0


def test_total_is_the_weighted_sum_of_the_parts():
    output = PrunedOutput(torch.randn(2, 3), torch.randn(2, 4, 8), torch.ones(2, 4), (torch.ones(2, 4),))
    target, teacher = torch.rand(2, 3).softmax(-1), (torch.randn(2, 3), torch.randn(2, 4, 8))
    total, parts = DynamicViTLoss([0.7], ratio_weight=3.0, distill_weight=0.25, token_weight=0.125)(output, target, teacher)
    assert set(parts) == {"classification", "ratio", "distillation", "tokens"}
    weighted = parts["classification"] + 3 * parts["ratio"] + 0.25 * parts["distillation"] + 0.125 * parts["tokens"]
    torch.testing.assert_close(total, weighted)
    torch.testing.assert_close(parts["classification"], -(target * output.logits.log_softmax(-1)).sum(-1).mean())
    assert parts["ratio"].item() == pytest.approx(0.09, rel=1e-5)


def test_without_its_weight_tokens_may_be_of_another_width():
    output = PrunedOutput(torch.randn(2, 3), torch.randn(2, 4, 8), None, ())
    target = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    total, parts = DynamicViTLoss((), token_weight=0.0)(output, target, (torch.randn(2, 3), torch.randn(2, 9, 16)))
    assert parts.keys() == {"classification", "distillation"}
    torch.testing.assert_close(total, parts["classification"] + 0.5 * parts["distillation"])


def test_without_tokens_and_teacher_only_classification_counts():
    output = PrunedOutput(torch.randn(2, 3), torch.randn(2, 4, 8), None, ())
    total, parts = DynamicViTLoss([])(output, torch.rand(2, 3).softmax(-1))
    assert set(parts) == {"classification"} and total is parts["classification"]
