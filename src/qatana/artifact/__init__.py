"""What came out of training: codes, parameters, plan, and the graph of integer operators, in plain files."""

from qatana.artifact.artifact import Artifact

__all__ = ["Artifact"]
