"""The flow in the shell: `qatana plan | calibrate | train | convert | export | verify | report | run | ptq | formats | bench | demo`."""

from qatana.cli.app import app

__all__ = ["app"]
