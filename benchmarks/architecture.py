"""One architecture through the whole flow: plan, prepare, calibrate, one step of the Trainer, convert, save, reload, forward."""

from __future__ import annotations

import copy
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qatana as qt
from qatana.prepare.products import Products

WEIGHTS, INPUTS, PIXELS = "int8/channel", "int8/token", "int8/tensor sym dynamic"
SMALLEST = 1e-6
"""Of a model's largest output: random weights may let it vanish on its way through the layers, and then any two models are equal."""


@dataclass
class Outcome:
    """A row of the table. `error`: the stage that failed and what it said; `left`: weights of matrix products that stay float;
    `float_error`: how far the prepared model, its quantizers off, is from the float model, relative to its largest output;
    `no_graph`: why torch.export cannot capture it: then the integer modules are saved, not an artifact."""

    model_type: str
    family: str
    model: str
    mode: str = ""
    matrix_weights: int = 0
    quantized: float = 0.0
    left: list[tuple[str, int, str]] = field(default_factory=list)
    loss: float = float("nan")
    without_gradient: list[str] = field(default_factory=list)
    float_error: float = float("nan")
    differing: float = float("nan")
    bytes_ratio: float = float("nan")
    seconds: float = 0.0
    no_graph: str = ""
    error: str = ""

    @property
    def passed(self) -> bool:
        return (
            not self.error
            and self.quantized >= 0.99
            and not self.without_gradient
            and self.differing == 0
            and self.float_error < 1e-3
        )


def default_recipe() -> qt.Recipe:
    """8-bit weights per channel, inputs quantized per token, those of convolutions (whose channels come first) per tensor."""
    return qt.recipe("torch", weight=WEIGHTS, input=INPUTS).rule(type="*Conv*[123]d", input=PIXELS)


def run(
    model_type: str, family: str, make: Callable[[], tuple[nn.Module, dict[str, Any]]], recipe: qt.Recipe | None = None
) -> Outcome:
    """The flow. What goes wrong is a row, whatever it is."""
    outcome, start = Outcome(model_type, family, ""), time.perf_counter()
    stage = ["build"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers says of tiny configs is no matter of ours
            torch.manual_seed(0)
            model, batch = make()
            outcome.model = type(model).__name__
            _flow(model.eval(), batch, recipe or default_recipe(), outcome, stage)
    except Exception as error:  # every failure is a row of the table
        outcome.error = f"{stage[0]}: {_line(error)}"
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _flow(model: nn.Module, batch: dict[str, Any], recipe: qt.Recipe, outcome: Outcome, stage: list[str]) -> None:
    stage[0] = "float"
    with Products(model) as products, torch.no_grad():
        before = _output(model, batch)
    if not float(before.abs().max()) > SMALLEST:
        raise ValueError(f"the largest output is {float(before.abs().max()):.0e}: nothing is left to compare")
    moving = _float_gradients(copy.deepcopy(model), batch)
    fresh = copy.deepcopy(model)
    stage[0] = "plan"
    plan = qt.plan(model, recipe, batch)
    outcome.mode = plan.mode
    _coverage(plan, model, products.found, outcome)
    stage[0] = "prepare"
    model = qt.prepare(model, plan)
    with torch.no_grad():
        after = _output(model, batch)
    outcome.float_error = float((after - before).abs().max() / before.abs().max())
    stage[0] = "calibrate"
    qt.calibrate(model, [batch])
    stage[0] = "train"
    found = _trainer_step(model, batch, outcome)
    outcome.without_gradient = sorted(moving - found)
    stage[0] = "convert"
    model.eval()
    with torch.no_grad():
        ours = _output(model, batch)
    try:
        artifact = qt.convert(model)
    except Exception as error:  # a forward that depends on values has no graph: torch.export says so in many ways
        outcome.no_graph = _line(error)
        theirs, size = _by_modules(model, fresh, plan, batch, stage)
    else:
        theirs, size = _by_graph(artifact, batch, stage)
    outcome.bytes_ratio = round(size / plan.float_bytes, 4)
    outcome.differing = float((ours != theirs).float().mean()) if ours.shape == theirs.shape else 1.0
    if not bool(torch.isfinite(ours).all()):
        raise ValueError("the output is not finite")


def _by_graph(artifact: qt.Artifact, batch: dict[str, Any], stage: list[str]) -> tuple[Tensor, int]:
    """What the saved artifact computes, and its bytes."""
    stage[0] = "save"
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "artifact")
        loaded = qt.Artifact.load(Path(folder) / "artifact")
    stage[0] = "compare"
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    with torch.no_grad():
        found = _output(loaded, tensors)
    return found, sum(t.numel() * t.element_size() for t in loaded.tensors.values())


def _by_modules(
    model: nn.Module, fresh: nn.Module, plan: qt.Plan, batch: dict[str, Any], stage: list[str]
) -> tuple[Tensor, int]:
    """The same without a graph: the state of the integer model goes through a file into an integer model of other weights."""
    stage[0] = "save"
    integer = qt.integer_model(model)
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: x.clone() for name, x in integer.state_dict().items()}, folder + "/model.safetensors")
        saved = load_file(folder + "/model.safetensors")
    other = qt.integer_model(qt.calibrate(qt.prepare(fresh, plan), [batch]))
    other.load_state_dict(saved, assign=True)
    stage[0] = "compare"
    with torch.no_grad():
        found = _output(other.eval(), batch)
    each = {x.data_ptr(): x.numel() * x.element_size() for x in integer.state_dict().values()}
    return found, sum(each.values())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _coverage(plan: qt.Plan, model: nn.Module, products: dict[str, nn.Parameter], outcome: Outcome) -> None:
    """Share of the weights that enter matrix products which is quantized; a computed weight counts by its row."""
    rows = {row.name: row for row in plan.rows if row.role == "weight"}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    left: list[tuple[str, int, str]] = []
    for name, parameter in products.items():
        known = [rows[n] for own in names[id(parameter)] for n in (own, f"{own}.weight") if n in rows]
        outcome.matrix_weights += parameter.numel()
        if not any(row.scheme for row in known):
            left.append((name, parameter.numel(), known[0].reason if known else "not in the plan"))
    multiplied = {name for parameter in products.values() for name in names[id(parameter)]}
    computed = [
        row for name, row in rows.items() if row.kind not in ("embedding", "other") and ".parametrizations" not in name
    ]
    for row in computed:
        if row.name not in multiplied and row.name.removesuffix(".weight") not in multiplied and row.scheme is not None:
            outcome.matrix_weights += row.elements
    outcome.left = left
    outcome.quantized = 1 - sum(elements for _, elements, _ in left) / max(1, outcome.matrix_weights)


def _float_gradients(model: nn.Module, batch: dict[str, Any]) -> set[str]:
    """Parameters of the float model that have a gradient that is not zero."""
    model.train()
    torch.manual_seed(1)
    _loss(model(**batch)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def _loss(out: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
    """Every float tensor of an output takes part: what a model predicts does not matter here."""
    loss = sum((x.float() ** 2).mean() for x in _tensors(out) if x.requires_grad)
    assert isinstance(loss, Tensor)
    return loss


class _Watch(transformers.TrainerCallback):
    """Keeps which parameters have a gradient that is not zero, before the optimizer's step."""

    def __init__(self) -> None:
        self.moving: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.moving = {name for name, p in named if p.grad is not None and bool(p.grad.any())}


def _trainer_step(model: nn.Module, batch: dict[str, Any], outcome: Outcome) -> set[str]:
    """One step of the Trainer; the parameters that moved."""
    torch.manual_seed(1)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, learning_rate=1e-4, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, options, data_collator=lambda items: items[0], train_dataset=[batch], compute_loss_func=_loss, callbacks=[watch]
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    outcome.loss = round(loss, 6)
    return watch.moving


def _tensors(out: Any) -> Iterator[Tensor]:
    """Every float tensor of an output."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif hasattr(out, "values"):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)


def _output(model: Callable[..., Any], batch: dict[str, Any]) -> Tensor:
    """What a model computes from the same random numbers each time: some draw in eval mode too (the order of patches)."""
    torch.manual_seed(2)
    return _first(model(**batch))


def _first(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "values"):
        return out["logits"] if "logits" in out else next(_tensors(out))
    return next(_tensors(out))


def as_dict(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome) | {"passed": outcome.passed}
