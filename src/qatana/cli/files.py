"""export, verify: of a job's run folder, or of an artifact folder and a file by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qatana as qt
from qatana.cli.options import Out, RecipeName, Restart, Seeds, chosen, console, open_runs
from qatana.errors import ArtifactError, ParityError
from qatana.jobs.tensors import batches_for

Source = Annotated[Path, typer.Argument(metavar="JOB.yaml|ARTIFACT", help="A job file, or an artifact folder.")]
File = Annotated[
    Path | None, typer.Argument(metavar="[FILE.onnx]", help="With an artifact: the file.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option(help="With an artifact: inputs as a safetensors file, one tensor per input.", show_default=False),
]
Engine = Annotated[str | None, typer.Option(help="onnxruntime or openvino; default: the target's.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(
        epilog="Examples: [bold]qatana export examples/ner.yaml -r int8[/] and "
        "[bold]qatana export runs/ner/artifacts/int8 out.onnx[/]"
    )(export)
    app.command(
        epilog="Examples: [bold]qatana verify examples/ner.yaml -r int8[/] and "
        "[bold]qatana verify runs/ner/artifacts/int8 runs/ner/int8.onnx[/]   exit code 1: it is not what was trained"
    )(verify)


def export(
    source: Source,
    file: File = None,
    recipe: RecipeName = None,
    out: Out = None,
    seed: Seeds = None,
    restart: Restart = False,
) -> None:
    """Write the deployed file."""
    if not _is_job(source):
        path = qt.export(qt.Artifact.load(source), _given(file, "export"))
        console.print(f"  {path}  {path.stat().st_size:,} bytes", highlight=False)
        return
    for run in open_runs(source, out, seed, restart):
        for section in chosen(run, recipe):
            final = run.phases(section)[-1]
            size = run.export(section, final).result["bytes"]
            console.print(f"  {run.folder / run.stem(section, final)}.onnx  {size:,} bytes", highlight=False)


def verify(
    source: Source, file: File = None, recipe: RecipeName = None, out: Out = None, seed: Seeds = None,
    data: Data = None, engine: Engine = None,
) -> None:  # fmt: skip
    """Prove that the file's integers are the trained ones: compare codes at every quantizer, operator by operator."""
    if not _is_job(source):
        path, artifact = _given(file, "verify"), qt.Artifact.load(source)
        certificate = qt.verify(None, artifact, path, batches_for(artifact, data), engine=engine)
        console.print(str(certificate), markup=False, highlight=False)
        certificate.raise_on_difference()
        return
    failed = False
    for run in open_runs(source, out, seed):
        for section in chosen(run, recipe):
            final = run.phases(section)[-1]
            engines = run.file_engines(section)
            found = run.verify(section, final, engine or (engines[0] if engines else "torch")).result
            console.print(found["text"], markup=False, highlight=False)
            failed |= not found["verdict"]
    if failed:
        raise ParityError("a file is not what was trained; the lines above name the first tensor that differs")


def _is_job(source: Path) -> bool:
    return source.suffix in (".yaml", ".yml", ".json") and not source.is_dir()


def _given(file: Path | None, command: str) -> Path:
    if file is None:
        raise ArtifactError(f"name the file: qatana {command} ARTIFACT FILE.onnx")
    return file
