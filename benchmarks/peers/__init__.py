"""The peers: NAME.txt is what their environment holds, NAME.py how the library's own documentation prepares a model for W8A8 QAT.

Each module has `prepare(model, batch, head, kind)` -> (model ready to train, a remark for the table).   batch: what the model takes;
head: name of the last layer, which stays float as it does for qatana;   kind: "bert", "llama" or "resnet"."""
