"""A whole job: every seed, every stage, then the files that are read by people."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qatana as qt
from qatana.files import write_json
from qatana.jobs import reporting
from qatana.jobs.job import Job
from qatana.jobs.progress import Progress
from qatana.jobs.results import Results, averaged, collect
from qatana.jobs.run import PTQ, Run

MEASURED_BATCHES, MEASURED_ROWS = 2, 16  # enough for errors to a tenth of a decibel: millions of values per tensor


@dataclass(frozen=True)
class Outcome:
    """What `run_job` leaves: the files for people, the result table, and what failed to verify."""

    folder: Path
    files: list[Path]
    table: Any
    failures: list[str]
    results: list[Results]


def runs(job: Job, folder: str | Path, progress: Progress, *, restart: bool = False, ptq: bool = False) -> list[Run]:
    """One Run per seed: in the folder itself, or in seed-N below it where there are several."""
    folder = Path(folder)
    several = len(job.seeds) > 1
    return [
        Run(job, folder / f"seed-{seed}" if several else folder, seed, progress, restart=restart, ptq=ptq)
        for seed in job.seeds
    ]


def run_job(
    job: Job, folder: str | Path | None = None, *, progress: Progress | None = None, restart: bool = False,
    ptq: bool = False,
) -> Outcome:  # fmt: skip
    """Run a job, skipping stages that are done. Raises: QatanaError of whichever stage cannot go on.

    ptq  calibrate, deploy and judge every recipe without training it; the report goes to folder/ptq/
    A certificate that fails does not stop the job: it stands in `Outcome.failures`."""
    progress = progress or Progress()
    target = Path(folder or job.output or f"runs/{job.name}")
    write_json(target / "job.json", job.model_dump(mode="json", by_alias=True, exclude={"folder", "output"}))
    made = runs(job, target, progress, restart=restart, ptq=ptq)
    results = []
    for run in made:
        if len(made) > 1:
            progress.say(f"[bold]seed {run.seed}[/]")
        results.append(collect(run))
    files = reporting.write(job, results, target / "ptq" if ptq else target, measured(made[0]))
    rows, spread = averaged(results)
    failures = [failure for result in results for failure in result.failures]
    return Outcome(target, files, reporting.table(results[0], rows, spread), failures, results)


def measured(run: Run) -> dict[str, Any]:
    """Per-layer errors and histograms of every recipe, for the report."""
    found: dict[str, list[Any]] = {"layers": [], "histograms": []}
    for section in run.job.recipes:
        final = run.phases(section)[-1]

        def work(scratch: Path, section: Any = section, final: str = final) -> Any:
            rows = min(MEASURED_ROWS, section.calibration.batch_size)
            batches = list(itertools.islice(run.task.calibration(rows, run.seed), MEASURED_BATCHES))
            trained = run.model(section, final) if final != PTQ else None
            return qt.measure(run.float_model(), run.model(section, PTQ), trained, batches, variant=section.name)

        inputs = {"ptq": run.ptq(section), "final": run.trained(section, final)}
        name = f"{section.name}.layers{'-ptq' * run.ptq_only}"
        record = run.stages.run(name, inputs, work, (), f"{section.name}: error of each layer")
        for key in found:
            found[key] += record.result.get(key, [])
    return found
