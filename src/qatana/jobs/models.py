"""The float model of a job: where it comes from, and how it is kept between stages.

Two kinds. Hugging Face models by hub id, folder or package path; networks of the user's own by "file.py:function"."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import ModelError, nearest, require
from qatana.files import replacing_folder, write_json
from qatana.jobs.job import Job
from qatana.jobs.text_files import resolve_path
from qatana.jobs.weights import check_weights, load_into, save_tensors

AUTO = {
    "token-classification": "AutoModelForTokenClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "language-modeling": "AutoModelForCausalLM",
}
WEIGHTS = "model.safetensors"


def build(job: Job, classes: Sequence[str], seed: int) -> nn.Module:
    """The model that a job starts from, in eval mode; layers without pretrained weights are drawn from `seed`.

    Raises: DataError, ModelError if it cannot be found, is not of the task or holds NaN."""
    torch.manual_seed(seed)
    model = _own(job) if job.task == "image-classification" else _hugging_face(job, job.path(job.model), classes)
    if job.float_.weights:
        load_into(model, resolve_path(job.path(job.float_.weights)))
    check_weights(model)
    return model.eval()


def save(job: Job, model: nn.Module, folder: str | Path) -> None:
    """Write the float model as a folder that `load` (and, for Hugging Face models, from_pretrained) reads."""
    with replacing_folder(folder) as temporary:
        save_tensors(_once(model), temporary / WEIGHTS)
        if job.task == "image-classification":
            write_json(temporary / "network.json", {"model": job.model, "options": job.model_options})
        else:
            config: Any = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            if job.task == "language-modeling":
                config.use_cache = True  # whoever loads the folder generates
            config.save_pretrained(temporary)
            tokenizer(job).save_pretrained(temporary)


def load(job: Job, folder: str | Path, classes: Sequence[str]) -> nn.Module:
    """The model that `save` wrote, in eval mode."""
    if job.task == "image-classification":
        return load_into(_own(job), Path(folder) / WEIGHTS).eval()
    return _hugging_face(job, str(folder), classes).eval()


def tokenizer(job: Job) -> Any:
    """The fast tokenizer beside a Hugging Face model."""
    transformers = require("transformers", "hf")
    with quiet():
        where, options = _place(job.path(job.model))
        return _loaded(lambda: transformers.AutoTokenizer.from_pretrained(where, **options), job.model)


def known_classes(job: Job) -> list[str] | None:
    """Names of the classes that a fine-tuned Hugging Face model brings, in the order of its outputs; None if it has none."""
    if job.task == "image-classification":
        return None
    transformers = require("transformers", "hf")
    with quiet():
        config = _loaded(lambda: transformers.AutoConfig.from_pretrained(resolve_path(job.path(job.model))), job.model)
    names = [config.id2label[i] for i in sorted(config.id2label)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _hugging_face(job: Job, where: str, classes: Sequence[str]) -> nn.Module:
    transformers = require("transformers", "hf")
    kind = getattr(transformers, AUTO[job.task])
    options: dict[str, Any] = {}
    if job.task != "language-modeling":  # its outputs are the vocabulary
        names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        options = {"num_labels": len(classes), **names}
    with quiet():
        place, file = _place(where)
        model = _loaded(
            lambda: kind.from_pretrained(place, dtype=torch.float32, **file, **options, **job.model_options), where
        )
    if file:
        del model.config.quantization_config  # the file's format; its weights are float32 here
    if job.task == "language-modeling":
        model.config.use_cache = False  # no stage generates: keys and values are not handed out
    return model


def _place(where: str) -> tuple[Path | str, dict[str, str]]:
    """Folder or hub id, and what from_pretrained wants to know besides: a GGUF file is named apart from its folder."""
    found = resolve_path(where)
    if isinstance(found, Path) and found.suffix == ".gguf":
        return found.parent, {"gguf_file": found.name}
    return found, {}


def _once(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model; of a Hugging Face one, which ties its parameters anew when it is loaded, each of them once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _loaded(load: Any, where: str) -> Any:
    """What transformers loads, its many exceptions as one line."""
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, json.JSONDecodeError) as error:
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise ModelError(
            f"cannot load the model '{where}': {line[:200]}; give a hub id, a folder or package:NAME/path"
        ) from error


def load_any(spec: str, shape: Sequence[int]) -> tuple[nn.Module, Any]:
    """A model by itself, in eval mode, with example inputs: zeros of `shape` for file.py:function, else 16 token ids."""
    if ".py:" in spec:
        return network(spec, spec.rpartition(":")[0], {}).eval(), torch.zeros(tuple(shape))
    transformers = require("transformers", "hf")
    where = resolve_path(spec)
    with quiet():
        config = _loaded(lambda: transformers.AutoConfig.from_pretrained(where), spec)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = _loaded(lambda: kind.from_pretrained(where, dtype=torch.float32), spec)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _own(job: Job) -> nn.Module:
    return network(job.model, job.path(job.model.rpartition(":")[0]), job.model_options)


def network(spec: str, file: str, options: dict[str, Any]) -> nn.Module:
    """A network of the user's own: spec "file.py:name", a class or function called with the options. `file`: where the file is.

    This runs the file: it is code that the job's author chose, as any import is."""
    path, name = Path(file), spec.rpartition(":")[2]
    if path.suffix != ".py":
        raise ModelError(f"model '{spec}' names no network; write file.py:function for images")
    if not path.is_file():
        raise ModelError(
            f"model file {path} does not exist; paths are relative to the job file or to where qatana was started"
        )
    module_spec = importlib.util.spec_from_file_location(f"qatana_model_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ModelError(
            f"{path} defines no '{name}'{nearest(name, [n for n in vars(module) if not n.startswith('_')])}"
        )
    try:
        model = getattr(module, name)(**options)
    except TypeError as error:
        raise ModelError(f"{spec} cannot be called with {options}: {error}; correct model_options") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its own progress bars and reports of new layers, while this lasts."""
    logging = require("transformers.utils.logging", "hf")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
