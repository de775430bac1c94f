"""A made-up but plausible report: MiniLM in int8, int4 and int2, 219 tensors. Seeded: it never changes."""

from __future__ import annotations

import math
import random
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

import pytest

from qatana.report.data import ReportData

VARIANTS = {"int8": 8, "int4": 4, "int2": 2}
SCHEMES = {
    "int8": "int8, per channel, symmetric",
    "int4": "uint4, blocks of 32, asymmetric",
    "int2": "uint2, blocks of 16, asymmetric",
}
LINEARS = [
    ("attention.self.query", 384, 384),
    ("attention.self.key", 384, 384),
    ("attention.self.value", 384, 384),
    ("attention.output.dense", 384, 384),
    ("intermediate.dense", 384, 1536),
    ("output.dense", 1536, 384),
]
TENSORS = [(f"bert.encoder.layer.{n}.{name}", i, o) for n in range(6) for name, i, o in LINEARS]


@pytest.fixture(scope="session")
def sample() -> ReportData:
    return ReportData.model_validate(sample_json())


def sample_json() -> dict[str, Any]:
    rng = random.Random(7)
    layers = [row for variant in VARIANTS for row in _layers(variant, rng)]
    return {
        "title": "MiniLM for named entities: int8, int4 and int2",
        "created": datetime(2026, 11, 21, 14, 5, tzinfo=timezone.utc).isoformat(),
        "job": "examples/ner.yaml",
        "command": "qatana run examples/ner.yaml --seeds 3",
        "machine": {"cpu": "AMD EPYC 9575F", "isa": "AVX-512 VNNI", "threads": 2},
        "versions": {"qatana": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1"},
        "results": _results(),
        "token_tables": [_tokens("float, PyTorch", 0.0), _tokens("int8-qat, ONNX Runtime", 0.003)],
        "curves": _curves(rng),
        "layers": layers,
        "histograms": [_histogram(row, rng) for row in layers if row["role"] == "weight"],
        "plan": [row for variant in VARIANTS for row in _plan(variant)],
        "certificates": [_certificate(variant, rng) for variant in VARIANTS],
    }


def _results() -> list[dict[str, Any]]:
    # name: F1, spread, bytes, latency in ONNX Runtime and OpenVINO
    models = {
        "float": (86.41, 0.18, 133_093_490, 61.2, 57.9),
        "int8-ptq": (85.46, 0.21, 33_741_201, 24.1, 17.6),
        "int8-qat": (86.27, 0.16, 33_741_201, 24.0, 17.5),
        "int4-ptq": (84.92, 0.24, 20_115_872, 33.8, None),
        "int4-qat": (86.09, 0.20, 20_115_872, 33.9, None),
        "int2-ptq": (61.38, 1.92, 13_402_114, 35.5, None),
        "int2-qat": (83.57, 0.33, 13_402_114, 35.6, None),
    }
    rows = []
    for name, (f1, spread, size, ort, openvino) in models.items():
        torch_ms = 108.4 if name == "float" else None
        for engine, latency, float_ms in (
            ("torch", torch_ms, 108.4),
            ("onnxruntime", ort, 61.2),
            ("openvino", openvino, 57.9),
        ):
            if latency is None and engine != "torch":
                continue
            rows.append(
                {
                    "name": name,
                    "engine": engine,
                    "metric": {
                        "name": "entity F1",
                        "value": f1 + (0.01 if engine == "openvino" else 0),
                        "spread": spread,
                    },
                    "file_bytes": None if engine == "torch" else size,
                    "latency_ms": latency,
                    "speedup_vs_float_same_engine": latency and float_ms / latency,
                    "speedup_vs_torch_float": latency and 108.4 / latency,
                }
            )
    return rows


def _tokens(name: str, drop: float) -> dict[str, Any]:
    rows = [
        ("O", 0.993, 0.994, 38_323),
        ("B-LOC", 0.918, 0.925, 1_668),
        ("B-MISC", 0.784, 0.801, 702),
        ("B-ORG", 0.871, 0.868, 1_661),
        ("B-PER", 0.951, 0.949, 1_617),
        ("I-LOC", 0.832, 0.845, 257),
        ("I-MISC", 0.667, 0.722, 216),
        ("I-ORG", 0.861, 0.887, 835),
        ("I-PER", 0.971, 0.981, 1_156),
    ]
    table = [
        {
            "label": label,
            "precision": p - drop,
            "recall": r - drop,
            "f1": 2 * p * r / (p + r) - drop,
            "support": n,
        }
        for label, p, r, n in rows
    ]
    return {"name": name, "rows": table}


def _curves(rng: random.Random) -> list[dict[str, Any]]:
    runs = {"float": (1500, 1.9, 0.06, 86.4), "int8-qat": (700, 0.16, 0.05, 86.27)}
    runs |= {"int4-qat": (700, 0.24, 0.06, 86.09), "int2-qat": (700, 1.1, 0.11, 83.57)}
    return [_curve(name, *shape, rng) for name, shape in runs.items()]


def _curve(name: str, steps: int, start: float, end: float, f1: float, rng: random.Random) -> dict[str, Any]:
    step = list(range(0, steps, 2))
    quantized = name != "float"
    decay = [math.exp(-5 * s / steps) for s in step]
    return {
        "run": name,
        "step": step,
        "loss": [(end + (start - end) * d) * rng.lognormvariate(0, 0.25) for d in decay],
        "metric": [f1 - 25 * d * (start / 2) if s % 100 == 0 else None for s, d in zip(step, decay, strict=True)],
        "metric_name": "entity F1",
        "lr": [(3e-4 if not quantized else 5e-5) * 0.5 * (1 + math.cos(math.pi * s / steps)) for s in step],
        "saturation": [0.004 * start + 0.002 * d for d in decay] if quantized else [],
        "scale_drift": [0.09 * (1 - d) * start**0.5 for d in decay] if quantized else [],
        "marks": [{"step": 100, "text": "fake quantization starts"}, {"step": 560, "text": "ranges freeze"}]
        if quantized
        else [],
    }


def _layers(variant: str, rng: random.Random) -> list[dict[str, Any]]:
    bits = VARIANTS[variant]
    rows = []
    for name, n_in, n_out in [("bert.embeddings.word_embeddings", 30522, 384), *TENSORS]:
        base = 6.02 * bits - 7.5 + rng.gauss(0, 1.4) - (6 if name.endswith("5.output.dense") else 0)
        rows.append(_layer(name, "weight", SCHEMES[variant], bits, base, variant, rng, n_in * n_out * bits // 8))
        if not name.startswith("bert.emb"):
            outlier = -9 if name.endswith(("2.output.dense", "3.output.dense")) else 0
            scheme = "uint8, per tensor, asymmetric" if variant == "int8" else "int8, per token, dynamic"
            rows.append(_layer(name, "input", scheme, 8, 36 + outlier + rng.gauss(0, 2.5), variant, rng, None))
    return rows


def _layer(
    name: str,
    role: str,
    scheme: str,
    bits: int,
    base: float,
    variant: str,
    rng: random.Random,
    size: int | None,
) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "scheme": scheme,
        "bits": bits,
        "variant": variant,
        "bytes": size,
        "sqnr_ptq": base,
        "sqnr_qat": base + abs(rng.gauss(1.2, 0.9)),
        "saturation": max(0.0, rng.gauss(0.002, 0.002)),
        "zeros": min(1.0, 0.7 / 2 ** (bits / 2) + rng.random() * 0.05),
    }


def _histogram(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    bits, sigma = row["bits"], 0.04 * rng.lognormvariate(0, 0.2)
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    bins, reach = 128, 5.2 * sigma
    edges = [-reach + 2 * reach * k / bins for k in range(bins + 1)]

    def counts(width: float, comb: float) -> list[int]:
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        pull = [1 + comb * math.cos(2 * math.pi * m / scale) for m in middles]
        return [round(4000 * p * math.exp(-(abs(m / width) ** 1.4))) for m, p in zip(middles, pull, strict=True)]

    # 2 and 4 bits clip what 8 bits can hold, as the searched ranges do.
    scale = {8: 4.6, 4: 3.1, 2: 1.9}[bits] * sigma / hi if bits > 2 else 0.95 * sigma
    grid = {"scale": scale, "lo": lo, "hi": hi}
    return {
        "layer": row["name"],
        "role": "weight",
        "variant": row["variant"],
        "stages": [
            {"stage": "float", "edges": edges, "counts": counts(sigma * 1.2, 0)},
            {"stage": "ptq", "edges": edges, "counts": counts(sigma * 1.2, 0), "grid": grid},
            {
                "stage": "qat",
                "edges": edges,
                "counts": counts(sigma * 1.25, 0.35 if bits < 8 else 0),
                "grid": {**grid, "scale": scale * 0.93},
            },
        ],
    }


def _plan(variant: str) -> list[dict[str, Any]]:
    rows = [
        {
            "tensor": f"{name}.weight",
            "module_type": "Linear",
            "role": "weight",
            "scheme": SCHEMES[variant],
            "rule": "type: Linear",
            "bytes": i * o * VARIANTS[variant] // 8,
        }
        for name, i, o in TENSORS
    ]
    norms = [f"bert.encoder.layer.{n}.{part}.LayerNorm" for n in range(6) for part in ("attention.output", "output")]
    rows += [
        {
            "tensor": f"{name}.weight",
            "module_type": "LayerNorm",
            "role": "weight",
            "reason": "LayerNorm stays float in this target",
            "rule": "target",
            "bytes": 384 * 4,
        }
        for name in norms
    ]
    rows.append(
        {
            "tensor": "classifier.weight",
            "module_type": "Linear",
            "role": "weight",
            "reason": "skipped by the recipe",
            "rule": "skip: classifier",
            "bytes": 9 * 384 * 4,
        }
    )
    return [{**row, "variant": variant} for row in rows]


def _certificate(variant: str, rng: random.Random) -> dict[str, Any]:
    layers, drift = [], 0.0
    for n in range(6):
        for operator in (
            "MatMulInteger",
            "Softmax",
            "MatMulInteger",
            "LayerNormalization",
            "MatMulInteger",
            "Gelu",
            "MatMulInteger",
        ):
            if n >= 1 and operator in ("Softmax", "Gelu", "LayerNormalization"):
                drift += rng.random() * 8e-6
            codes = 1_536_000
            layers.append(
                {
                    "name": f"bert.encoder.layer.{n}.{len(layers) % 7}",
                    "operator": operator,
                    "codes": codes,
                    "different": round(codes * drift),
                }
            )
    different = sum(layer["different"] for layer in layers)
    codes = sum(layer["codes"] for layer in layers)
    same = {"tensors_compared": 113, "codes_compared": 182_476_800, "codes_different": 0}
    labels = {"labels_compared": 46_435, "labels_different": 3}
    first = next(layer for layer in layers if layer["different"])
    return {
        "verdict": "pass",
        "variant": variant,
        "allowed": "5 labels in 10,000, end to end",
        "isa": "AVX-512 VNNI",
        "comparisons": [
            {
                "left": "QAT model",
                "right": "integer model",
                "engine": "torch",
                "mode": "end to end",
                **same,
                "labels_compared": 46_435,
            },
            {
                "left": "integer model",
                "right": "model.onnx",
                "engine": "onnxruntime",
                "mode": "layer by layer",
                **same,
            },
            {
                "left": "integer model",
                "right": "model.onnx",
                "engine": "onnxruntime",
                "mode": "end to end",
                "verdict": "pass",
                "tensors_compared": len(layers),
                "codes_compared": codes,
                "codes_different": different,
                **labels,
                "first_difference": {
                    "tensor": first["name"],
                    "index": [3, 17, 201],
                    "left": 118,
                    "right": 119,
                },
                "drift_began_at": first["operator"],
                "layers": layers,
            },
        ],
        "files": [
            {"path": f"{variant}/model.onnx", "sha256": rng.randbytes(32).hex(), "bytes": 33_741_201},
            {"path": f"{variant}/codes.safetensors", "sha256": rng.randbytes(32).hex(), "bytes": 33_102_976},
        ],
    }
