"""Installed versions of what takes part in a proof."""

from __future__ import annotations

import importlib.metadata


def versions() -> dict[str, str]:
    """Name -> version; packages that are not installed are left out."""
    found = {}
    for name in ("qatana", "torch", "numpy", "onnx", "onnxruntime", "openvino", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
