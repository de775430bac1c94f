"""From statistics to parameters to a quantizer of one tensor."""

from qatana.quantizer.quantizer import Quantizer, quantizers
from qatana.quantizer.ranges import Range, tensor_range, weight_parameters
from qatana.quantizer.ranks import agree, merge_ranks, total_over_ranks

__all__ = [
    "Quantizer",
    "Range",
    "agree",
    "merge_ranks",
    "quantizers",
    "tensor_range",
    "total_over_ranks",
    "weight_parameters",
]
