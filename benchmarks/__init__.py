"""How fast the files are, and what a step of training with quantization costs: `python -m benchmarks`, `make bench`."""
