"""The price of a step of LoRA inside the quantizers, against training all weights with the same quantizers, and against float32.

    python -m benchmarks.lora [--rounds 5] [--threads 1] [--quick] [--out benchmarks/results/lora.json]

A Llama with the shape of SmolLM2-135M and random weights: int4 in groups of 32 with learned scales (the tied table too), inputs int8 per
token; adapters of rank 4 on every linear layer of the blocks. All three live in one process and take turns; memory is measured as
docs/performance.md says. Gradients are part of the peak; the optimizer's state, which is there between steps too, stands beside it."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.__main__ import others, versions
from benchmarks.inference import spread
from qatana.files import write_json
from qatana.hardware import describe, processor
from qatana.jobs.progress import Progress
from qatana.jobs.training_step import PARTS, TrainingStep

FLOAT, FULL, LORA = "float32", "full QAT", "LoRA QAT"
RECIPE = {"target": "torch", "rules": [{"schemes": {"weight": "int4/group32 sym learned", "input": "int8/token"}}]}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, BATCH = 4, (2, 128)
SHAPES: dict[bool, dict[str, Any]] = {
    False: {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3},
    True: {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small shape: whether it works, not how fast it is")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lora.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    progress = Progress(Console(soft_wrap=True))
    with others() as busy:
        rows = measure(given.rounds, given.quick, progress)
    place = describe() | {"processor": processor(), "threads": given.threads, "busy_with_others": busy[0]}
    write_json(given.out, {
        "command": shlex.join(["python", "-m", "benchmarks.lora", *arguments]), "machine": place,
        "versions": versions() | {"peft": version("peft")},
        "title": f"Llama of {rows[0]['parameters'] / 1e6:.0f} million parameters, batch {BATCH[0]} x {BATCH[1]}",
        "rank": RANK, "rounds": given.rounds, "rows": rows,
    })  # fmt: skip
    print(f"written to {given.out}")


def measure(rounds: int, quick: bool, progress: Progress) -> list[dict[str, Any]]:
    """A row for each way to train; ratios are those to full QAT in the same round."""
    steps: dict[str, TrainingStep] = {}
    for name in (FLOAT, FULL, LORA):
        progress.say(f"{name}: model")
        steps[name] = TrainingStep(model(name, quick), forward(quick))
        steps[name]()  # the optimizer makes its state
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    with progress.bar("rounds", rounds) as advance:
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(step.turn())
            advance()
    return [row(name, step, found[name], found[FULL]) for name, step in steps.items()]


def model(name: str, quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    import qatana as qt

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPES[quick], tie_word_embeddings=True, use_cache=False))
    if name == FLOAT:
        return llama
    qt.calibrate(qt.prepare(llama, qt.plan(llama, qt.Recipe.from_dict(RECIPE))))
    if name == FULL:
        return llama
    import peft

    from qatana.integrations.huggingface import add_lora

    return add_lora(llama, peft.LoraConfig(r=RANK, target_modules=list(TARGETS), init_lora_weights="gaussian"))


def forward(quick: bool) -> Any:
    ids = torch.randint(SHAPES[quick]["vocab_size"], BATCH, generator=torch.Generator().manual_seed(0))
    return lambda model: model(input_ids=ids)


def row(name: str, step: TrainingStep, ms: list[dict[str, float]], full: list[dict[str, float]]) -> dict[str, Any]:
    parameters = list(step.model.parameters())
    ratios = [mine["step"] / theirs["step"] for mine, theirs in zip(ms, full, strict=True)]
    state = [x for values in step.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
    return {
        "name": name,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "milliseconds": {part: spread([turn[part] for turn in ms]) for part in PARTS},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory": {
            "saved": step.saved_bytes(),
            "peak": step.peak_bytes(),
            "optimizer": sum(x.numel() * x.element_size() for x in state),
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
