"""A job with one seed, stage by stage. Each method is one stage and asks for those before it, so any can be the last.

folder/float/                    the float model            folder/NAME.onnx             the deployed file
folder/float.onnx                the same, exported         folder/certificates/         what `verify` found
folder/checkpoints/NAME-*.       PTQ and QAT states         folder/predictions/          labels of the test part
folder/artifacts/NAME/           integers and graph         folder/stages/               records (stages.py)"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qatana as qt
from qatana.files import write_json
from qatana.jobs import bench, models
from qatana.jobs.evaluate import ArtifactRunner, FileRunner, Runner, TorchRunner, predict
from qatana.jobs.job import Gptq, Job, RecipeSection
from qatana.jobs.progress import Progress
from qatana.jobs.stages import Record, Stages
from qatana.jobs.tasks import Task, spread, task
from qatana.jobs.text_files import resolve_path
from qatana.jobs.weights import load_tensors, save_tensors

PTQ, QAT = "ptq", "qat"


class Run:
    """Stages of a job in a folder. Nothing is computed until a stage is asked for.

    ptq  calibrate only, whatever the recipes train; file names are those of a job's PTQ models, so both fit into one folder"""

    def __init__(
        self, job: Job, folder: str | Path, seed: int, progress: Progress, *, restart: bool = False, ptq: bool = False
    ) -> None:
        self.job, self.folder, self.seed, self.progress, self.ptq_only = job, Path(folder), seed, progress, ptq
        self.stages = Stages(self.folder, progress, restart=restart)

    @cached_property
    def task(self) -> Task:
        return task(self.job)

    @cached_property
    def _start(self) -> dict[str, Any]:
        """What every model of the run depends on."""
        model = self.job.model
        where = model.rpartition(":")[0] if ".py:" in model else model
        found = resolve_path(self.job.path(where))
        weights = self.job.float_.weights
        return {
            "model": [model, self.job.model_options, _files_digest(found)],
            "weights": _files_digest(resolve_path(self.job.path(weights))) if weights else None,
            "data": self.task.trained_on,
            "seed": self.seed,
        }

    # -- float -----------------------------------------------------------------------------------------------------
    def float_(self) -> Record:
        """Train, or take over, the float model."""
        section = self.job.float_

        def work(scratch: Path) -> Any:
            model = models.build(self.job, self.task.classes, self.seed)
            curve = self._fit(model, section.training, section.batch_size, scratch, "float training")
            models.save(self.job, model, self.folder / "float")
            return {"curve": curve, "classes": self.task.classes}

        inputs = self._start | {"training": _dump(section.training), "batch_size": section.batch_size}
        return self.stages.run("float", inputs, work, ["float"], "float model")

    def float_longer(self) -> Record:
        """The float model trained once more: as long in all as the QAT models."""
        section = self.job.float_

        def work(scratch: Path) -> Any:
            model = self.float_model()
            curve = self._fit(model, section.longer, section.batch_size, scratch, "float training, longer")
            models.save(self.job, model, self.folder / "float-longer")
            return {"curve": curve}

        inputs = {"float": self.float_(), "training": _dump(section.longer)}
        return self.stages.run("float-longer", inputs, work, ["float-longer"], "float model, trained longer")

    def float_file(self) -> Record:
        """The float model as ONNX."""

        def work(scratch: Path) -> Any:
            path = qt.export_float(self.float_model(), self._example(), self.folder / "float.onnx")
            return {"bytes": path.stat().st_size}

        return self.stages.run("float-file", {"float": self.float_()}, work, ["float.onnx"], "float model to ONNX")

    def float_model(self, folder: str = "float") -> nn.Module:
        """The trained float model, loaded anew (prepare changes models in place)."""
        return models.load(self.job, self.folder / folder, self.task.classes)

    # -- quantized -------------------------------------------------------------------------------------------------
    def plan(self, section: RecipeSection) -> qt.Plan:
        """The plan of a recipe, on the float model of this run, or on the one it would start from."""
        return qt.plan(self.untrained(), self.job.recipe(section), self._example())

    def untrained(self) -> nn.Module:
        """The float model of this run where it is done, else the one that it would start from."""
        done = (self.folder / "float" / models.WEIGHTS).is_file()
        return self.float_model() if done else models.build(self.job, self.task.classes, self.seed)

    def ptq(self, section: RecipeSection) -> Record:
        """Equalize and reorder if asked, plan, prepare, calibrate, round by GPTQ if asked."""

        def work(scratch: Path) -> Any:
            model, batches = self.float_model(), section.calibration.batches
            equalized, reordered = self._equalize(model, section), self._reorder(model, section)
            model = self._prepared(section, model)
            with self.progress.bar("calibration batches", batches) as advance:
                qt.calibrate(model, self._calibration(section), batches=batches, progress=lambda done: advance())
            rounded = self._gptq(model, section)
            save_tensors(model.state_dict(), self.folder / self.state_file(section, PTQ))
            return {
                "plan": model.qatana_plan.to_dict(),
                "equalized": equalized,
                "reordered": reordered,
                "gptq": rounded,
            }

        rounding = section.gptq.model_dump() if isinstance(section.gptq, Gptq) else section.gptq or None
        asked = {"equalize": section.equalize, "reorder": section.reorder, "gptq": rounding}
        inputs = {
            "float": self.float_(),
            "recipe": self.job.recipe(section).to_dict(),
            "calibration": section.calibration.model_dump(),
        } | {key: value for key, value in asked.items() if value is not None}
        name = f"{section.name}.{PTQ}"
        return self.stages.run(name, inputs, work, [self.state_file(section, PTQ)], f"{section.name}: calibrate (PTQ)")

    def qat(self, section: RecipeSection) -> Record:
        """Train with quantization in the loop, from the PTQ model, the float model as teacher."""
        training = section.training

        def work(scratch: Path) -> Any:
            assert training is not None
            model = self.model(section, PTQ)
            taught = training.distillation or training.hidden_distillation
            teacher = self.float_model() if taught else None
            curve = self._fit(model, training, section.batch_size, scratch, f"{section.name} QAT", teacher)
            save_tensors(model.state_dict(), self.folder / self.state_file(section, QAT))
            return {"curve": curve}

        inputs = {"ptq": self.ptq(section), "training": _dump(training), "batch_size": section.batch_size}
        name = f"{section.name}.{QAT}"
        return self.stages.run(name, inputs, work, [self.state_file(section, QAT)], f"{section.name}: train (QAT)")

    def trained(self, section: RecipeSection, phase: str) -> Record:
        """The record of the PTQ or QAT stage."""
        return self.ptq(section) if phase == PTQ else self.qat(section)

    def model(self, section: RecipeSection, phase: str) -> nn.Module:
        """The PTQ or QAT model of a recipe, in eval mode, quantizers on."""
        model = self._prepared(section, self.float_model())
        model.load_state_dict(load_tensors(self.folder / self.state_file(section, phase)))
        for quantizer in qt.quantizers(model).values():
            quantizer.enabled = True
        return model.eval()

    # -- deployed --------------------------------------------------------------------------------------------------
    def convert(self, section: RecipeSection, phase: str) -> Record:
        """The trained integers and their graph."""
        stem = self.stem(section, phase)

        def work(scratch: Path) -> Any:
            qt.convert(self.model(section, phase)).save(self.folder / "artifacts" / stem)
            return {"bytes": sum(f.stat().st_size for f in (self.folder / "artifacts" / stem).iterdir())}

        inputs = {"model": self.trained(section, phase)}
        return self.stages.run(f"{stem}.convert", inputs, work, [f"artifacts/{stem}"], f"{stem}: convert to integers")

    def export(self, section: RecipeSection, phase: str) -> Record:
        """The file that is deployed."""
        stem = self.stem(section, phase)

        def work(scratch: Path) -> Any:
            artifact = qt.Artifact.load(self.folder / "artifacts" / stem)
            path = qt.export(artifact, self.folder / f"{stem}.onnx")
            return {"bytes": path.stat().st_size}

        inputs = {"artifact": self.convert(section, phase)}
        return self.stages.run(f"{stem}.export", inputs, work, [f"{stem}.onnx"], f"{stem}: export")

    def verify(self, section: RecipeSection, phase: str, engine: str) -> Record:
        """QAT model, integer model and file, compared code by code. The result is the certificate; a failed one is a result."""
        stem = self.stem(section, phase)
        file = f"certificates/{stem}-{engine}.json"
        deployed = f"artifacts/{stem}" if self.is_free(section) else f"{stem}.onnx"

        def work(scratch: Path) -> Any:
            evaluation = self.job.evaluation
            batches = spread(self.task.test(evaluation.verify_batch_size), evaluation.verify_batches)
            artifact = qt.Artifact.load(self.folder / "artifacts" / stem)
            with self.progress.bar("comparing codes", len(batches)) as advance:
                found = qt.verify(
                    self.model(section, phase), artifact, self.folder / deployed, batches, engine=engine,
                    progress=lambda done: advance(),
                )  # fmt: skip
            data: dict[str, Any] = found.to_dict() | {"variant": stem}
            data["files"] = [{**entry, "path": Path(entry["path"]).name} for entry in data["files"]]
            write_json(self.folder / file, data)
            return {
                "parity": found.parity,
                "drift": found.drift,
                "verdict": found.verdict,
                "text": str(found),
                "certificate": data,
            }

        inputs = {
            "file": self.convert(section, phase) if self.is_free(section) else self.export(section, phase),
            "evaluation": self.job.evaluation.model_dump(include={"verify_batches", "verify_batch_size", "limit"}),
        }
        return self.stages.run(f"{stem}.verify-{engine}", inputs, work, [file], f"{stem}: verify in {engine}")

    def is_free(self, section: RecipeSection) -> bool:
        """Whether the recipe's target is bound to no engine: its artifact is what is deployed, and PyTorch runs it."""
        return self.job.recipe(section).resolved.free

    def file_engines(self, section: RecipeSection) -> list[str]:
        """The job's engines that run files of this recipe's target, the target's own first."""
        runtimes = self.job.recipe(section).resolved.runtimes
        return [engine for engine in runtimes if engine in self.job.engines]

    def phases(self, section: RecipeSection) -> list[str]:
        """PTQ, and QAT where the job trains."""
        return [PTQ] if section.training is None or self.ptq_only else [PTQ, QAT]

    def stem(self, section: RecipeSection, phase: str) -> str:
        """Name of what is deployed: the recipe's, with "-ptq" where the trained one is deployed too."""
        return section.name if phase == QAT or section.training is None else f"{section.name}-{phase}"

    # -- judged ----------------------------------------------------------------------------------------------------
    def evaluate(self, name: str, engine: str, source: Record, runner: Any) -> Record:
        """Score of one model in one engine on the test part. `runner` makes the Runner when it is needed."""
        stem = f"{name}-{engine}"
        evaluation = self.job.evaluation

        def work(scratch: Path) -> Any:
            found = predict(runner(), self.task, evaluation.batch_size, self.progress, f"{name} in {engine}")
            save_tensors(found, self.folder / f"predictions/{stem}.safetensors")
            return self.task.score(found)

        inputs = {"source": source, "data": self.task.judged_on, "batch_size": evaluation.batch_size}
        files = [f"predictions/{stem}.safetensors"]
        return self.stages.run(f"evaluate.{stem}", inputs, work, files, f"evaluate {name} in {engine}")

    def labels(self, name: str, engine: str) -> torch.Tensor:
        """The labels that `evaluate` found."""
        return load_tensors(self.folder / f"predictions/{name}-{engine}.safetensors")["labels"]

    def benchmark(self, runners: dict[str, Any], sources: dict[str, Record]) -> Record:
        """Median latencies, all in one run. runners: "name engine" -> function that makes the Runner."""
        spec = self.job.benchmark

        def work(scratch: Path) -> Any:
            made: dict[str, Runner] = {name: make() for name, make in runners.items()}
            batch = self.task.sample(spec.batch, spec.sequence)
            return bench.latencies(made, batch, spec.rounds, self.progress)

        inputs = {**sources, "benchmark": spec.model_dump(), "threads": bench.threads()}
        return self.stages.run(f"benchmark{'-ptq' * self.ptq_only}", inputs, work, (), "measure latency")

    def torch_runner(self, model: nn.Module) -> Runner:
        return TorchRunner(model)

    def artifact_runner(self, stem: str) -> Runner:
        return ArtifactRunner(self.folder / "artifacts" / stem)

    def file_runner(self, file: str, engine: str) -> Runner:
        return FileRunner(self.folder / file, engine, bench.threads())

    # -- helpers ---------------------------------------------------------------------------------------------------
    def _equalize(self, model: nn.Module, section: RecipeSection) -> list[dict[str, Any]]:
        """Equalize a float model in place where the recipe asks for it; what was found."""
        if section.equalize is None:
            return []
        batches = section.calibration.batches
        with self.progress.bar("batches seen for equal channels", batches) as advance:
            found = qt.equalize(
                model,
                self._calibration(section),
                strength=section.equalize,
                batches=batches,
                progress=lambda done: advance(),
            )
        self.progress.say(f"{section.name}: channels of {len(found)} tensors equalized")
        return [row._asdict() for row in found]

    def _reorder(self, model: nn.Module, section: RecipeSection) -> list[dict[str, Any]]:
        """Sort the channels of a float model in place where the recipe asks for it; what was found."""
        if section.reorder is None:
            return []
        found = qt.reorder(model, self._calibration(section), group=section.reorder)
        self.progress.say(f"{section.name}: channels of {len(found)} tensors reordered")
        return [row._asdict() for row in found]

    def _gptq(self, model: nn.Module, section: RecipeSection) -> list[dict[str, Any]]:
        """Round weights by GPTQ where the recipe asks for it; what was found."""
        batches = section.gptq_batches
        if batches is None:
            return []
        with self.progress.bar("GPTQ: batches, then layers") as advance:
            found = qt.gptq(
                model,
                self._calibration(section),
                batches=batches,
                progress=lambda done, total: advance(1, f"{done} of {total}"),
            )
        self.progress.say(f"{section.name}: weights of {len(found)} layers rounded by GPTQ")
        return [row._asdict() for row in found]

    def _calibration(self, section: RecipeSection) -> Any:
        return self.task.calibration(section.calibration.batch_size, self.seed)

    def _prepared(self, section: RecipeSection, model: nn.Module) -> Any:
        return qt.prepare(model, qt.plan(model, self.job.recipe(section), self._example()))

    def _example(self) -> Any:
        return self.task.sample(2, min(16, self.job.benchmark.sequence))

    def _fit(
        self, model: nn.Module, training: qt.Training | None, batch_size: int, scratch: Path, what: str,
        teacher: nn.Module | None = None,
    ) -> Any:  # fmt: skip
        """Train in place; the curve that a report draws, None if nothing is trained."""
        if training is None:
            return None
        loader = self.task.train(batch_size, self.seed)
        with self.progress.bar(what, training.total_steps(loader)) as advance:

            def on_step(record: dict[str, Any]) -> None:
                advance(record["step"] - shown[0], f"loss {record['loss']:.4f}")
                shown[0] = record["step"]

            shown = [0]
            seeded = training.model_copy(update={"seed": self.seed})
            history = qt.fit(model, loader, seeded, teacher=teacher, on_step=on_step, checkpoint=scratch)
        return history.curve()

    def state_file(self, section: RecipeSection, phase: str) -> str:
        return f"checkpoints/{section.name}-{phase}.safetensors"


def _dump(training: qt.Training | None) -> Any:
    return None if training is None else training.model_dump(mode="json", exclude={"checkpoint_every"})


def _files_digest(where: Path | str) -> str:
    """sha256 over the files of a model; a hub id stands for itself."""
    if isinstance(where, str):
        return where
    digest = hashlib.sha256()
    for file in [where] if where.is_file() else sorted(p for p in where.rglob("*") if p.is_file()):
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
