"""What SmolLM2 writes before and after: float, calibrated (PTQ), trained (QAT) and as integers, side by side.

    qatana run examples/smollm2.yaml && python examples/smollm2.py runs/smollm2

Each integer model is also left as a folder that from_pretrained reads: runs/smollm2/NAME-hf."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatana.integrations.huggingface import integer_model
from qatana.jobs import Progress, Run, load_job

PROMPTS = ("The history of the violin begins", "Water boils when", "The capital of France is")


def main(folder: Path) -> None:
    run = Run(load_job(Path(__file__).with_name("smollm2.yaml")), folder, 0, Progress())
    tokenizer = AutoTokenizer.from_pretrained(folder / "float")
    models: dict[str, Any] = {"float": run.float_model()}
    for section in run.job.recipes:
        models |= {f"{section.name}-{phase}": run.model(section, phase) for phase in run.phases(section)}
        place = folder / f"{section.name}-hf"
        integers = integer_model(models[f"{section.name}-{run.phases(section)[-1]}"])
        integers.config.use_cache = True
        integers.save_pretrained(place)
        models[f"{section.name}-integers"] = AutoModelForCausalLM.from_pretrained(place)
    for prompt in PROMPTS:
        print(f"\n{prompt} ...")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for name, model in models.items():
            with torch.inference_mode():
                out = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=True)
            print(f"  {name:21}{tokenizer.decode(out[0, ids.shape[1] :]).strip()!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2"))
