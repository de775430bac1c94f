"""Whole jobs from a file: data, float model, PTQ, QAT, deployment, proof, report. Above the facade, below the command line."""

from qatana.jobs.demo import demo_job
from qatana.jobs.job import Job, job_of, load_job
from qatana.jobs.progress import Progress
from qatana.jobs.run import PTQ, QAT, Run
from qatana.jobs.whole import Outcome, run_job, runs

__all__ = ["PTQ", "QAT", "Job", "Outcome", "Progress", "Run", "demo_job", "job_of", "load_job", "run_job", "runs"]
