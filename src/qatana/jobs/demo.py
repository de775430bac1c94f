"""The demo: job 1 (names in CoNLL-2003 with MiniLM, int8, int4 and int2), shortened to minutes on two cores."""

from __future__ import annotations

from importlib.resources import as_file, files

from qatana.jobs.job import Job, load_job


def demo_job() -> Job:
    """The job of `qatana demo`: demo.yaml of this package, the same as examples/ner-demo.yaml."""
    with as_file(files("qatana.jobs") / "demo.yaml") as path:
        return load_job(path)
