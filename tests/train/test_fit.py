"""fit against loops written out by hand, what it records, and how it stops."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatana as qt
from qatana.errors import DataError, ModelError
from qatana.numerics import affine
from qatana.train import Training, TrainingError, distillation_loss, fit


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_adamw_equals_a_loop_written_out(vectors) -> None:
    model = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 4))
    other = copy.deepcopy(model)
    training = Training(steps=7, lr=0.01, warmup=2, schedule="linear", clip=0.5, weight_decay=0.1, seed=None)
    history = fit(model, vectors, training)

    decayed, plain = [other[0].weight, other[2].weight], [other[0].bias, other[2].bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    losses, norms = [], []
    for step, factor in enumerate([1 / 2, 2 / 2, 1.0, 4 / 5, 3 / 5, 2 / 5, 1 / 5]):
        x, y = vectors[step % 5]
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        loss = F.cross_entropy(other(x), y)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_([*decayed, *plain], 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    # Factors are computed as 1 - 1/5 here and as 4/5 above: an ulp of float64 in lr, so an ulp of float32 in weights.
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert history.series("loss") == pytest.approx(losses, rel=1e-6)
    assert history.series("grad_norm") == pytest.approx(norms, rel=1e-5)
    assert history.series("step") == [1, 2, 3, 4, 5, 6, 7]
    assert history.series("saturation") == [None] * 7
    assert {r["phase"] for r in history.records} == {"float"}


def test_sgd_on_a_quantized_cnn_equals_a_loop_written_out(cnn, images) -> None:
    model, other = cnn(), cnn()
    training = Training(steps=6, lr=0.05, optimizer="sgd", warmup=0, schedule="constant", clip=None, weight_decay=0.0,
                        freeze_batch_norm_at=3)  # fmt: skip
    history = fit(model, images, training)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, fused=True)
    controller = qt.train.Controller(other, 6, freeze_batch_norm_at=3)
    other.train()
    for step in range(6):
        x, y = images[step % 5]
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        optimizer.step()
        controller.step()
    same(model, other)
    assert history.marks() == [{"step": 4, "text": "quantized, batch norm frozen"}]
    assert not model.training


def test_training_recovers_what_two_bits_lost(two_bits, vectors) -> None:
    """The point of it all: after QAT the 2-bit model fits its data far better than right after calibration."""
    model = two_bits()
    history = fit(model, vectors, Training(steps=60, lr=3e-3, clip=None))
    losses = history.series("loss")
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_distillation_mixes_the_losses(two_bits, vectors) -> None:
    teacher = nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4))
    model = two_bits()
    probe = two_bits().train()
    torch.manual_seed(0)  # fit seeds dropout with training.seed
    x, y = vectors[0]
    logits = probe(x)
    task, kl = F.cross_entropy(logits, y), distillation_loss(logits, teacher(x), temperature=2.0)
    records: list[dict[str, Any]] = []
    fit(
        model,
        vectors,
        Training(steps=1, lr=1e-3, distillation=0.25, temperature=2.0),
        teacher=teacher,
        on_step=records.append,
    )
    assert records[0]["task_loss"] == float(task.detach())
    assert records[0]["distillation_loss"] == float(kl.detach())
    assert records[0]["loss"] == pytest.approx(
        0.75 * float(task.detach()) + 0.25 * float(kl.detach()), rel=1e-6
    )  # float32
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_alone_needs_no_labels(two_bits, vectors) -> None:
    teacher = nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4))
    probe = two_bits().train()
    torch.manual_seed(0)  # fit seeds dropout with training.seed
    x = vectors[0][0]
    expected = distillation_loss(probe(x), teacher(x))
    records: list[dict[str, Any]] = []
    training = Training(steps=1, lr=1e-3, distillation=1.0)
    fit(two_bits(), [x for x, _ in vectors], training, teacher=teacher, on_step=records.append)
    assert records[0]["loss"] == records[0]["distillation_loss"] == float(expected.detach())
    assert "task_loss" not in records[0]


def test_autocast_is_of_the_forward_pass_alone(vectors) -> None:
    def network() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4))

    model, seen = network(), []
    model.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    records: list[dict[str, Any]] = []
    fit(model, vectors, Training(steps=2, lr=1e-3, autocast="bfloat16"), on_step=records.append)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x, y = vectors[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = network()(x)
    assert records[0]["loss"] == float(F.cross_entropy(logits.float(), y).detach())


def test_a_loss_function_and_dict_batches(vectors) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(128, 4)

        def forward(self, x, attention_mask=None):
            return {"logits": self.layer(x)}

    batches = [{"x": x, "labels": y} for x, y in vectors]
    seen = []

    def loss(logits, labels):
        seen.append((logits.shape, labels.shape))
        return ((logits - F.one_hot(labels, 4)) ** 2).mean()

    model = Named()
    expected = float(loss(model.layer(vectors[0][0]), vectors[0][1]).detach())
    history = fit(model, batches, Training(steps=1, lr=0.1), loss=loss)
    assert history.records[0]["loss"] == expected
    assert seen[-1] == ((8, 4), (8,))


def test_epochs_are_asked_for_in_order(vectors) -> None:
    class Loader:
        def __init__(self) -> None:
            self.opened: list[int] = []

        def __len__(self) -> int:
            return 2

        def epoch(self, n: int):
            self.opened.append(n)
            return iter(vectors[:2])

    loader = Loader()
    fit(nn.Linear(128, 4), loader, Training(epochs=2.5, lr=0.1))  # type: ignore[arg-type]
    assert loader.opened == [0, 1, 2]


def test_saturation_and_drift_of_learned_scales(two_bits, vectors) -> None:
    model = two_bits()
    weights = {n: q for n, q in qt.quantizers(model).items() if q.learned}
    layers = [m for m in model.modules() if getattr(m, "weight_quantizer", None) in weights.values()]
    ends = total = 0
    for layer in layers:
        q: Any = layer.weight_quantizer
        codes = affine.levels(q.scheme.granularity.view(layer.weight.detach()), q.scale.detach(), q.zero_point, -2, 1)
        ends, total = ends + int(((codes == -2) | (codes == 1)).sum()), total + codes.numel()
    history = fit(model, vectors, Training(steps=3, lr=1e-3, warmup=0, scale_lr=0.0, sample_every=2))
    # Tensors of at most 16,384 codes are looked at whole, those of 128 x 128 too.
    assert history.series("saturation")[0] == pytest.approx(ends / total, rel=1e-12)
    assert history.series("saturation")[1] is None
    assert history.series("scale_drift") == [0.0, None, 0.0]
    start = {n: q.scale.detach().clone() for n, q in weights.items()}
    history = fit(model, vectors, Training(steps=1, lr=1e-3, warmup=0, scale_lr=1e-3, sample_every=1))
    moved = [float((q.scale.detach() / start[n] - 1).abs().mean()) for n, q in weights.items()]
    assert history.records[0]["scale_drift"] == pytest.approx(sum(moved) / len(moved), rel=1e-6)  # float32 means
    assert all(q.tap is None for q in weights.values())


def test_float_start(cnn, images) -> None:
    model = cnn(calibrated=False)
    history = fit(model, images, Training(steps=8, lr=0.01, float_steps=3))
    assert history.marks()[0] == {"step": 4, "text": "quantized"}
    assert all(math.isfinite(x) for x in history.series("loss"))


def test_frozen_parameters_stay_and_are_given_back(vectors) -> None:
    model = nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 4))
    before = model[0].weight.detach().clone()
    fit(model, vectors, Training(steps=2, lr=0.1, frozen=("0.*",)))
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.requires_grad
    with pytest.raises(TrainingError, match=r"frozen: 'o\.weight' matches no parameter of the model; did you mean"):
        fit(model, vectors, Training(steps=2, lr=0.1, frozen=("o.weight",)))


# --- how it stops -----------------------------------------------------------------------------------------


def test_a_nan_in_the_data_is_named(two_bits, vectors, tmp_path) -> None:
    model = two_bits()
    bad = [*vectors[:3], (torch.full((8, 128), float("nan")), vectors[0][1])]
    after: dict[str, torch.Tensor] = {}

    def keep(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            after.update({k: v.clone() for k, v in model.state_dict().items()})

    training = Training(steps=9, lr=1e-3, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step 4: the loss is NaN; input 0 of the batch holds NaN"):
        fit(model, bad, training, on_step=keep, checkpoint=tmp_path / "run")
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())
    again = two_bits()  # the last good checkpoint still stands there, and good data goes on from it
    history = fit(again, [*vectors[:3], vectors[4]], training, checkpoint=tmp_path / "run")
    assert len(history.records) == 9


def test_an_exploding_training_is_told_to_slow_down(vectors) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 4))
    training = Training(steps=500, lr=1e6, optimizer="sgd", warmup=0, clip=None)
    with pytest.raises(TrainingError, match=r"step \d+: the (loss|gradient norm) is .*lower lr"):
        fit(model, vectors, training)


def test_a_nan_gradient_with_a_finite_loss_names_the_parameter(vectors) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(128, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.second(x) + (x * 0).sqrt() * 0  # value 0, derivative 0 * infinity

    model = Root()
    before = copy.deepcopy(model)
    with pytest.raises(
        TrainingError, match=r"step 1: the gradient norm is NaN; it begins in the gradient of 'first.bias'"
    ):
        fit(model, vectors, Training(steps=2, lr=0.1))
    same(model, before)


def test_labels_that_count_nothing() -> None:
    batch = {"input": torch.randn(2, 3, 8), "labels": torch.full((2, 3), -100)}
    with pytest.raises(TrainingError, match="every label of the batch is -100"):
        fit(nn.Linear(8, 4), [batch], Training(steps=1, lr=0.1))


def test_loaders_without_data(vectors) -> None:
    model = nn.Linear(128, 4)
    with pytest.raises(DataError, match="no batch in epoch 0"):
        fit(model, [], Training(steps=1, lr=0.1))
    with pytest.raises(DataError, match=r"no batch in epoch 1; .* not a generator"):
        fit(model, (v for v in vectors), Training(steps=9, lr=0.1))
    with pytest.raises(DataError, match="no labels"):
        fit(model, [vectors[0][0]], Training(steps=1, lr=0.1))


def test_models_and_teachers_that_do_not_fit(cnn, images) -> None:
    with pytest.raises(ModelError, match="not calibrated"):
        fit(cnn(calibrated=False), images, Training(steps=2, lr=0.1))
    with pytest.raises(TrainingError, match="distillation is 0"):
        fit(cnn(), images, Training(steps=2, lr=0.1), teacher=cnn())
    with pytest.raises(TrainingError, match="needs a teacher"):
        fit(cnn(), images, Training(steps=2, lr=0.1, distillation=0.5))


def test_the_signature_stays_small() -> None:
    assert list(inspect.signature(fit).parameters) == [
        "model", "loader", "training", "loss", "teacher", "on_step", "checkpoint"
    ]  # fmt: skip
