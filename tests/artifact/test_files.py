"""Artifacts on disk: damaged, foreign and hostile folders are refused in one line, and a failed save leaves the old one whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.flows import cnn

import qatana as qt
from qatana.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return cnn("functional").artifact.save(tmp_path / "artifact")


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def sign(folder: Path) -> None:
    """Write checksums that fit, as an attacker can."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in config["sha256"]}
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        qt.Artifact.load(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_saved_artifact_is_three_plain_files(saved: Path) -> None:
    assert set(content(saved)) == {"config.json", "graph.json", "model.safetensors"}
    config = json.loads((saved / "config.json").read_text())
    assert config["target"] == "ort:int8"
    assert len(config["plan"]) == len(cnn("functional").plan.rows)
    with safetensors.safe_open(str(saved / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(cnn("functional").artifact.tensors)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in saved.iterdir())


def test_saving_twice_gives_equal_bytes(saved: Path, tmp_path: Path) -> None:
    again = qt.Artifact.load(saved).save(tmp_path / "again")
    assert content(again) == content(saved)


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "a changed byte", "missing", "empty"])
def test_damaged_files(saved: Path, name: str, damage: str) -> None:
    data = (saved / name).read_bytes()
    if damage == "missing":
        (saved / name).unlink()
    else:
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (saved / name).write_bytes({"truncated": data[:-40], "empty": b"", "a changed byte": changed}[damage])
    refused(saved, rf"{name} is missing, truncated or changed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated or not JSON"),
        ("[]", "was not written by qatana"),
        ('{"format": "something"}', "was not written by qatana"),
        ('{"format": "qatana-artifact", "version": 99}', "has format version 99; this qatana reads 1"),
        ('{"format": "qatana-artifact", "version": 1}', "config.json"),
        ('{"format": "qatana-artifact", "version": 1, "sha256": 3}', "config.json"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
    ],
)
def test_foreign_configs(saved: Path, text: str | bytes, message: str) -> None:
    """A config without checksums, inputs or target is no config: what follows would fail far from its cause."""
    (saved / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(saved, message)


def test_not_a_folder_of_ours(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere is not an artifact: it has no config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not an artifact")


def forge(folder: Path, change: Any) -> None:
    """Change the records of the graph and sign the folder again."""
    records = json.loads((folder / "graph.json").read_text())
    change(records)
    (folder / "graph.json").write_text(json.dumps(records))
    sign(folder)


def call(records: list[Any], target: str, args: list[Any], op: str = "call_function") -> None:
    records.insert(1, {"name": "forged", "op": op, "target": target, "args": args, "kwargs": {"map": {}}})


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("os.system", ["true"]),
        ("builtins.eval", ["1"]),
        ("operator.methodcaller", ["x"]),
        ("prims.device_put.default", []),
        ("aten.__class__.default", []),
        ("aten.add.__class__", []),
        ("aten.no_such_operator.default", []),
        ("aten.from_file.default", ["{path}", True, 16]),
    ],
)
def test_forged_operators(saved: Path, tmp_path: Path, target: str, args: list[Any]) -> None:
    """Nothing outside the arithmetic of a network: aten.from_file, for one, creates and maps files."""
    victim = tmp_path / "victim"
    forge(
        saved, lambda records: call(records, target, [a.format(path=victim) if isinstance(a, str) else a for a in args])
    )
    refused(saved, "operator|not ours")
    assert not victim.exists()


def attack(victim: Path) -> str:
    """An expression that would create a file. A GraphModule is Python source made of these names: they must be names."""
    return f"getattr(__import__('os'), 'mkdir')({str(victim)!r})"


def test_forged_placeholder(saved: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    def change(records: list[Any]) -> None:
        placeholder = next(record for record in records if record["op"] == "placeholder")
        placeholder["target"] = f"input={attack(victim)}"

    forge(saved, change)
    refused(saved, "damaged|not ours")
    assert not victim.exists()


def test_forged_keyword(saved: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    forge(saved, lambda records: call(records, "aten.relu.default", [{"node": records[0]["name"]}]))
    forge(saved, lambda records: records[1].update(kwargs={"map": {f"x={attack(victim)}, y": 1}}))
    refused(saved, "damaged|not ours")
    assert not victim.exists()


def test_forged_tensor_name(saved: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    name = f'training") or {attack(victim)} or getattr(self, "training'
    tensors = safetensors.torch.load_file(str(saved / "model.safetensors"))
    safetensors.torch.save_file(tensors | {name: torch.zeros(1)}, str(saved / "model.safetensors"))
    forge(saved, lambda records: call(records, name, [], "get_attr"))
    with pytest.raises(ArtifactError, match=r"damaged|not ours"):
        qt.Artifact.load(saved)(cnn("functional").batch)
    assert not victim.exists()


@pytest.mark.parametrize("op", ["call_method", "call_module", "exec"])
def test_forged_node_kinds(saved: Path, op: str) -> None:
    forge(saved, lambda records: call(records, "cuda", [], op))
    refused(saved, f"no node of kind '{op}'")


@pytest.mark.parametrize(
    "value",
    [
        {"node": "nothing"},
        {"dtype": "load"},
        {"dtype": "float99"},
        {"layout": "__doc__"},
        {"unknown": 1},
        {"a": 1, "b": 2},
        {},
        {"device": "nowhere"},
    ],
)
def test_forged_arguments(saved: Path, value: dict[str, Any]) -> None:
    forge(saved, lambda records: call(records, "aten.neg.default", [value]))
    refused(saved, "damaged|unknown")


def test_records_that_are_no_records(saved: Path) -> None:
    for graph in ({}, [1], [{}], "text", None):
        (saved / "graph.json").write_text(json.dumps(graph))
        sign(saved)
        refused(saved, "damaged|not ours")


def test_a_tensor_that_the_graph_needs_is_missing(saved: Path) -> None:
    tensors = safetensors.torch.load_file(str(saved / "model.safetensors"))
    gone = next(name for name in tensors if name.endswith("weight"))
    del tensors[gone]
    safetensors.torch.save_file(tensors, str(saved / "model.safetensors"))
    sign(saved)
    refused(saved, f"needs tensor '{gone}'")


def test_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write"):
        cnn("functional").artifact.save(tmp_path / "file" / "artifact")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_the_old_artifact_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own answer to fsync on a full disk: the write fails late, when most is done."""
    before = content(saved)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device; free some space"):
        cnn("bottleneck").artifact.save(saved)
    assert content(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_write_that_the_kernel_stops_halfway(saved: Path) -> None:
    """A real one: no file of this process may grow beyond 4 kB, as on a full disk or a used-up quota."""
    before, limits = content(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*artifact"):
            cnn("bottleneck").artifact.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ArtifactError, match="choose a folder that you may write to"):
            cnn("functional").artifact.save(tmp_path / "artifact")
    finally:
        tmp_path.chmod(0o755)


def test_replacing_an_older_artifact(saved: Path) -> None:
    cnn("bottleneck").artifact.save(saved)
    assert torch.equal(
        qt.Artifact.load(saved)(cnn("bottleneck").batch), cnn("bottleneck").artifact(cnn("bottleneck").batch)
    )
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_calling_by_name_and_by_position() -> None:
    artifact, batch = cnn("functional").artifact, cnn("functional").batch
    assert torch.equal(artifact(input=batch), artifact(batch))


def kill_after_first_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save once more, killed when the old folder is moved away and the new one has not come yet."""
    rename = os.rename

    def first_only(source: Any, target: Any) -> None:
        if Path(target) == folder:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", first_only)
    with pytest.raises(KeyboardInterrupt):
        cnn("mixed").artifact.save(folder)
    monkeypatch.undo()
    assert not folder.exists()


def test_a_kill_between_the_two_renames_keeps_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)
    kill_after_first_rename(saved, monkeypatch)
    again = qt.Artifact.load(saved)
    assert set(again.tensors) == set(cnn("functional").artifact.tensors)
    assert content(again.save(saved)) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_second_kill_keeps_it_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is the only one now: a save must not remove it before the new one stands."""
    kill_after_first_rename(saved, monkeypatch)
    kill_after_first_rename(saved, monkeypatch)
    assert set(qt.Artifact.load(saved).tensors) == set(cnn("functional").artifact.tensors)


def test_what_is_left_of_an_older_artifact_is_no_substitute(saved: Path) -> None:
    """A folder that stands and is damaged is an error, whatever lies beside it."""
    older = cnn("mixed").artifact.save(saved.with_name(f".{saved.name}.old"))
    assert (older / "config.json").is_file()
    (saved / "config.json").unlink()
    refused(saved, "is not an artifact")


@pytest.mark.parametrize("place", [".", "/", "no/such/folder"])
def test_a_path_without_a_name_is_refused_too(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path(place), "is not an artifact")
