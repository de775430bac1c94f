"""QAT model == integer model == deployed file: compared, counted, certified."""

from qatana.verify.certificate import ALLOWED, Certificate, Comparison, Tally
from qatana.verify.engines import latency, open_file, run_file
from qatana.verify.verify import verify

__all__ = ["ALLOWED", "Certificate", "Comparison", "Tally", "latency", "open_file", "run_file", "verify"]
