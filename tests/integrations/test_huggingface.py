"""The callback and distillation inside the real Trainer, on real sentences of CoNLL-2003, a BERT of two small layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qatana as qt
from qatana.integrations.huggingface import Distillation, QatanaCallback
from qatana.jobs.text import encode_words, label_names, read_conll

ROWS = 64


@pytest.fixture(scope="module")
def rows(minilm_dir: Path, conll_dir: Path) -> list[dict[str, torch.Tensor]]:
    """The first sentences of the training part, padded to 24 pieces."""
    sentences = read_conll(conll_dir / "train.txt")[: 4 * ROWS]
    sentences = [s for s in sentences if len(s.words) <= 12][:ROWS]
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    data = encode_words(tokenizer, sentences, label_names(read_conll(conll_dir / "train.txt")), 24)
    out = []
    for ids, labels in zip(data.ids, data.labels, strict=True):
        assert isinstance(labels, list)
        pad = 24 - len(ids)
        row = {
            "input_ids": ids + [0] * pad,
            "attention_mask": [1] * len(ids) + [0] * pad,
            "labels": labels + [-100] * pad,
        }
        out.append({name: torch.tensor(value) for name, value in row.items()})
    return out


def bert() -> BertForTokenClassification:
    torch.manual_seed(5)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, num_labels=9
    )
    return BertForTokenClassification(config)


def batch(rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows[:16]]) for name in rows[0]}


def prepared(rows, target: str = "ort:int8", calibrated: bool = True) -> nn.Module:
    model = bert()
    model = qt.prepare(model, qt.plan(model, target, batch(rows)))
    return qt.calibrate(model, [batch(rows)]) if calibrated else model


def trainer(
    model: nn.Module, rows, folder: Path, callback: QatanaCallback, steps: int = 8, save: int = 1000, **kwargs
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, save_steps=save, logging_steps=1,
        use_cpu=True, disable_tqdm=True, report_to=[], dataloader_pin_memory=False, seed=3, **kwargs.pop("arguments", {}),
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback], **kwargs)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_int8_bert_trains_with_its_own_groups(rows, tmp_path) -> None:
    model = prepared(rows)
    optimizer = torch.optim.AdamW(qt.parameter_groups(model, 1e-3, 0.01))
    callback = QatanaCallback()
    run = trainer(model, rows, tmp_path, callback, steps=16, optimizers=(optimizer, None))
    run.train()
    found = losses(run)
    assert sum(found[-4:]) < 0.7 * sum(found[:4])
    assert callback.controller is not None
    assert callback.controller.current_step == 16
    codes = []
    qt.quantizers(model)["bert.encoder.layer.0.attention.self.query.input"].tap = lambda _name, c: codes.append(c.dtype)
    run.predict(rows[:8])  # type: ignore[arg-type]
    assert set(codes) == {torch.uint8}


def test_phases_count_optimizer_steps_not_batches(rows, tmp_path) -> None:
    model = prepared(rows, calibrated=False)
    callback = QatanaCallback(float_steps=0.5, freeze_ranges_at=6)
    run = trainer(model, rows, tmp_path, callback, arguments={"gradient_accumulation_steps": 2})
    phases: list[bool] = []
    run.add_callback(Before(lambda: phases.append(next(iter(qt.quantizers(model).values())).enabled)))
    run.train()
    assert phases == [False] * 4 + [True] * 4
    assert all(bool(q.calibrated) for q in qt.quantizers(model).values())


@pytest.mark.parametrize("target", ["ort:int8", "ort:int4"])
def test_a_resumed_training_equals_the_uninterrupted_one(target, rows, tmp_path) -> None:
    schedule = {"float_steps": 2, "freeze_ranges_at": 6}
    whole = prepared(rows, target)
    straight = trainer(whole, rows, tmp_path / "whole", QatanaCallback(**schedule), save=4)
    straight.train()

    first = trainer(prepared(rows, target), rows, tmp_path / "parts", QatanaCallback(**schedule), save=4)
    first.add_callback(StopAt(4))
    first.train()
    saved = json.loads((tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["QatanaCallback"]["attributes"]["saved"]["step"] == 4

    model, callback = prepared(rows, target, calibrated=False), QatanaCallback(**schedule)
    second = trainer(model, rows, tmp_path / "parts", callback, save=4)
    second.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert losses(second) == losses(straight)
    assert callback.controller is not None
    assert callback.controller.state_dict()["step"] == 8


def test_resuming_with_another_schedule_is_refused(rows, tmp_path) -> None:
    first = trainer(prepared(rows), rows, tmp_path, QatanaCallback(), save=4)
    first.add_callback(StopAt(4))
    first.train()
    second = trainer(prepared(rows), rows, tmp_path, QatanaCallback(freeze_ranges_at=7))
    with pytest.raises(qt.TrainingError, match="freeze_ranges_at=0, this one 7"):
        second.train(resume_from_checkpoint=True)


def test_restored_by_the_trainer_itself(rows, tmp_path) -> None:
    """With restore_callback_states_from_checkpoint the Trainer builds a new callback from the saved arguments."""
    first = trainer(prepared(rows), rows, tmp_path, QatanaCallback(freeze_ranges_at=7), save=4)
    first.add_callback(StopAt(4))
    first.train()
    arguments = {"restore_callback_states_from_checkpoint": True}
    second = trainer(prepared(rows), rows, tmp_path, QatanaCallback(), arguments=arguments)
    second.train(resume_from_checkpoint=True)
    callback = next(c for c in second.callback_handler.callbacks if isinstance(c, QatanaCallback))
    assert callback.controller is not None
    assert callback.controller.freeze_ranges_at == 7
    assert callback.controller.current_step == 8


def test_distillation_is_the_formula_and_exact_under_accumulation(rows, tmp_path) -> None:
    teacher = bert().eval()
    model = copy.deepcopy(teacher)
    nn.init.normal_(model.classifier.weight)
    distill = Distillation(model, teacher, share=0.3, temperature=2.0)
    inputs = batch(rows)
    labels = inputs.pop("labels")
    model.eval()
    outputs = model(**inputs)
    used = labels != -100
    expected = 0.7 * F.cross_entropy(outputs.logits[used], labels[used]) + 0.3 * qt.distillation_loss(
        outputs.logits[used], teacher(**inputs).logits[used], temperature=2.0
    )
    found = distill(outputs, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # the same float32 sums in another order
    parts = 0.0
    for half in (slice(0, 8), slice(8, 16)):
        part = model(**{k: v[half] for k, v in inputs.items()})
        parts = parts + distill(part, labels[half], num_items_in_batch=used.sum())
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=0)
    distill.remove()
    model(**inputs)
    assert distill._inputs == ((), {})
    with pytest.raises(qt.DataError, match="needs 'labels'"):
        distill(outputs, None)


def test_distillation_in_the_trainer(rows, tmp_path) -> None:
    """A student of 2-bit weights comes closer to its teacher, from the teacher's logits alone."""
    teacher = bert().eval()
    model = copy.deepcopy(teacher)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int2", batch(rows))), [batch(rows)])
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    used = torch.stack([row["labels"] for row in rows]) != -100

    @torch.no_grad()
    def distance() -> float:
        return float(qt.distillation_loss(model.eval()(**inputs).logits, teacher(**inputs).logits, mask=used))

    before = distance()
    distill = Distillation(model, teacher, share=1.0)
    trainer(model, rows, tmp_path, QatanaCallback(), steps=16, compute_loss_func=distill).train()
    assert distance() < before


class Before(TrainerCallback):
    """Looks at something before each optimizer step's first batch."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.look()


class StopAt(TrainerCallback):
    """Ends a training after a step, as a kill right after the checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step
