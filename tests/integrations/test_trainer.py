"""Models of QatanaConfig in the Trainer and in the hands of other tools: killed and resumed, checkpointed, compiled, copied, averaged."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from support import killed_training
from support.pretrained import W4A8, assert_same_state, ids, load, logits, write_bert, write_llama
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForTokenClassification, Trainer, TrainerCallback, TrainingArguments

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, QatanaConfig, integer_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids(batch=count)]


def trainer(
    model: nn.Module, folder: Path, steps: int = 4, callbacks: Any = (), kind: Any = Trainer, **arguments: Any
) -> Trainer:
    given = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, save_steps=1000,
        use_cpu=True, disable_tqdm=True, report_to=[], dataloader_pin_memory=False, seed=3, **arguments,
    )  # fmt: skip
    return kind(model, given, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def gradients(model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids(), labels=ids(), **kwargs).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# -- the Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_bit(bert_dir: Path, tmp_path: Path) -> None:
    """kill -9 in step 6, resumed from the checkpoint of step 4: weights, ranges, scales and losses of the uninterrupted run."""
    whole = killed_training.trainer(bert_dir, tmp_path / "whole")
    whole.train()
    command = [sys.executable, "-m", "support.killed_training", str(bert_dir), str(tmp_path / "parts")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["checkpoint-4"]
    resumed = killed_training.trainer(bert_dir, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert resumed.state.log_history[4:8] == whole.state.log_history[4:8]
    assert losses(resumed) == losses(whole)
    state = whole.model.state_dict()
    assert any(name.endswith("range.histogram") and bool(t.any()) for name, t in state.items())


def test_three_lines_train_evaluate_and_save(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    run = trainer(model, tmp_path, steps=12, callbacks=[QatanaCallback()])
    run.train()
    assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    assert run.evaluate()["eval_loss"] > 0
    run.save_model(str(tmp_path / "saved"))
    assert_same_state(load(tmp_path / "saved"), model)
    assert torch.equal(logits(integer_model(model)), logits(model))


def test_an_integer_model_is_not_trained(llama_dir: Path, tmp_path: Path) -> None:
    integer = load(llama_dir, W4A8, config={"trainable": False})
    assert not integer.hf_quantizer.is_trainable
    assert not integer.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(integer, tmp_path)


class Reporter(TrainerCallback):
    """Keeps what a reporter would write at once."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_metrics_reach_reporters_and_the_history(bert_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(bert_dir, quantization_config=QatanaConfig("ort:int8"))
    data = killed_training.Rows()
    ours, reporter = QatanaCallback(float_steps=2, freeze_ranges_at=3), Reporter()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, disable_tqdm=True,
        report_to=[], dataloader_pin_memory=False,
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=data, callbacks=[reporter, ours])  # type: ignore[arg-type]
    ours.report_through(run)
    run.train()
    seen = [entry for entry in reporter.seen if "loss" in entry]
    assert [entry["qatana/quantizing"] for entry in seen] == [0.0, 0.0, 1.0, 1.0]
    assert [entry["qatana/observing"] for entry in seen] == [1.0, 1.0, 1.0, 0.0]
    assert ["qatana/saturation" in entry for entry in seen] == [False, False, True, True]
    assert all(0 <= entry["qatana/saturation"] <= 1 for entry in seen[2:])
    kept = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["qatana/quantizing"] for entry in kept] == [0.0, 0.0, 1.0, 1.0]
    assert all(q.tap is None for q in qt.quantizers(model).values())


class Fused(Trainer):
    """Reads the head's weight itself, as fused losses do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1]
        return F.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_loss_past_the_head_s_quantizers_is_an_error(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    with pytest.raises(qt.ModelError, match="output head is quantized and did not run"):
        trainer(model, tmp_path, callbacks=[QatanaCallback()], kind=Fused).train()
    assert not model.lm_head._forward_hooks
    free = load(llama_dir, W4A8, config={"modules_to_not_convert": ["lm_head"]})
    trainer(free, tmp_path, callbacks=[QatanaCallback()], kind=Fused).train()


# -- how a step is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, bert_dir: Path) -> None:
    """The same gradients; and ranges that are followed see each batch once."""

    def once(checkpointing: bool) -> tuple[dict[str, torch.Tensor], nn.Module]:
        model = AutoModelForTokenClassification.from_pretrained(bert_dir, quantization_config=QatanaConfig("ort:int8"))
        qt.calibrate(model, [{"input_ids": ids(60)}])
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        qt.Controller(model, 4, freeze_ranges_at=3)
        model.train()
        torch.manual_seed(0)
        model(ids(60), labels=ids(5)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model

    (plain, a), (checkpointed, b) = once(False), once(True)
    assert set(plain) == set(checkpointed)
    # Reentrant checkpointing adds the gradients of a tensor up in another order: a rounding of float32 or two.
    share = 1e-6 if reentrant else 0.0
    for name, gradient in plain.items():
        assert float((checkpointed[name] - gradient).abs().max()) <= share * float(gradient.abs().max()), name
    assert_same_state(b, a)


def test_bf16_autocast(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    run = trainer(model, tmp_path, steps=6, callbacks=[QatanaCallback()], bf16=True)
    run.train()
    assert all(loss == loss and loss < 10 for loss in losses(run))
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}


def test_compiled_models_train_alike(llama_dir: Path) -> None:
    """One graph; the operators inside are ours, in float32, but inductor fuses what stands between them."""
    model = load(llama_dir, W4A8).train()
    expected = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model)
    compiled(ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # float32 sums in another order, which moves a few codes of the inputs by one: far below a percent of the norm
        assert float((p.grad - expected[name]).norm()) < 0.02 * float(expected[name].norm()), name


# -- what others wrap ------------------------------------------------------------------------------------------------


def test_deep_copies_are_apart(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight_quantizer is twin.model.embed_tokens.weight_quantizer
    assert twin.lm_head.weight_quantizer is not model.lm_head.weight_quantizer
    before = logits(model)
    trainer(twin, tmp_path, callbacks=[QatanaCallback()]).train()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    twin.save_pretrained(tmp_path / "twin")
    assert_same_state(load(tmp_path / "twin"), twin)
    integer = integer_model(model)
    assert torch.equal(logits(copy.deepcopy(integer)), logits(integer))


def test_exponential_averages(llama_dir: Path) -> None:
    """ema = 0.9 ema + 0.1 parameter, learned scales included; the average is a QAT model that converts."""
    model = load(llama_dir, W4A8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.update_parameters(model)  # the first update copies
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model.train()(ids(), labels=ids()).loss.backward()
    optimizer.step()
    average.update_parameters(model)
    averaged = dict(average.module.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            averaged[name], start[name].lerp(p, 0.1), rtol=1e-6, atol=1e-7
        )  # one rounding or two
    average.module.eval()
    assert torch.equal(logits(integer_model(average.module)), logits(average.module))


def test_accelerate_prepares_and_unwraps(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    AcceleratorState._reset_state()  # a Trainer with bf16=True in the same process leaves its precision behind
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-2))
    prepared.train()
    accelerator.backward(prepared(ids(), labels=ids()).loss)
    optimizer.step()
    whole = accelerator.unwrap_model(prepared).eval()
    whole.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(whole))
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(1)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(load(tmp_path)), logits(whole))
