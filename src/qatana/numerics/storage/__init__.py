"""Bytes and tensors as other libraries' files hold them: written from codes and parameters, and read back to them."""

from qatana.numerics.storage.bitnet import pack_bitnet, unpack_bitnet
from qatana.numerics.storage.bitsandbytes import (
    Nested,
    pack_4bit,
    pack_8bit,
    parameters_4bit,
    unpack_4bit,
    unpack_8bit,
)
from qatana.numerics.storage.compressed_tensors import (
    pack_mxfp4,
    pack_mxfp6,
    pack_mxfp8,
    pack_nvfp4,
    pack_plain,
    pack_quantized,
    unpack_mxfp4,
    unpack_mxfp6,
    unpack_mxfp8,
    unpack_nvfp4,
    unpack_plain,
    unpack_quantized,
)
from qatana.numerics.storage.onnx_tensors import ELEMENTS, pack_onnx, unpack_onnx
from qatana.numerics.storage.torch_native import (
    pack_float4,
    pack_float8,
    pack_int4_matmul,
    unpack_float4,
    unpack_float8,
    unpack_int4_matmul,
)

__all__ = [
    "ELEMENTS", "Nested", "pack_4bit", "pack_8bit", "pack_bitnet", "pack_float4", "pack_float8", "pack_int4_matmul", "pack_mxfp4",
    "pack_mxfp6", "pack_mxfp8", "pack_nvfp4", "pack_onnx", "pack_plain", "pack_quantized", "parameters_4bit", "unpack_4bit",
    "unpack_8bit", "unpack_bitnet", "unpack_float4", "unpack_float8", "unpack_int4_matmul", "unpack_mxfp4", "unpack_mxfp6",
    "unpack_mxfp8", "unpack_nvfp4", "unpack_onnx", "unpack_plain", "unpack_quantized",
]  # fmt: skip
