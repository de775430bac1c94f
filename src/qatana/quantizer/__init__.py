"""From statistics to parameters to a quantizer of one tensor."""

from qatana.quantizer.quantizer import Quantizer, quantizers
from qatana.quantizer.ranges import Range, tensor_range, weight_parameters

__all__ = ["Quantizer", "Range", "quantizers", "tensor_range", "weight_parameters"]
