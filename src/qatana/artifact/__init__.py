"""What came out of training: codes, parameters, plan, and the graph of integer operators, in plain files."""

from qatana.artifact.artifact import Artifact, sha256

__all__ = ["Artifact", "sha256"]
