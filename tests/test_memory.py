"""How much memory there is: the machine's, and what control groups leave of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from compress.engine import transaction
from compress.system import memory

MACHINE = 64 * 10**9
HOMES = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}
MEMBER = {1: "5:cpu:/x\n4:memory:{}\n0::/\n", 2: "0::{}\n"}
LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
USED = {1: "memory.usage_in_bytes", 2: "memory.current"}
CACHE = {1: "total_inactive_file", 2: "inactive_file"}
NONE = {1: 9223372036854771712, 2: "max"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    free = SimpleNamespace(available=MACHINE)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)


def group(folder: Path, version: int, limit: object, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIMIT[version]).write_text(f"{limit}\n")
    (folder / USED[version]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def member(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_without_control_groups_all_of_the_machine_counts(tmp_path):
    assert memory.available(tmp_path) == MACHINE


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", ["/", "/job/step", "/docker/unseen", "/../above"])
def test_the_limit_of_a_container_counts(tmp_path, version, path):
    """Inside a container the root is its group, whatever path the process is told."""
    member(tmp_path, MEMBER[version].format(path))
    stat = f"anon 7\n{CACHE[version]} {10**9}\nactive_file 9\n"
    group(tmp_path / HOMES[version], version, 8 * 10**9, 5 * 10**9, stat)
    assert memory.available(tmp_path) == 4 * 10**9


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_on_the_way_up_counts(tmp_path, version):
    member(tmp_path, MEMBER[version].format("/job/step"))
    job = tmp_path / HOMES[version] / "job"
    group(job / "step", version, NONE[version], 10**9)
    assert memory.available(tmp_path) == MACHINE
    group(job, version, 6 * 10**9, 2 * 10**9)
    assert memory.available(tmp_path) == 4 * 10**9
    group(job / "step", version, 3 * 10**9, 2 * 10**9)
    assert memory.available(tmp_path) == 10**9
    group(job / "step", version, 10**9, 2 * 10**9)
    assert memory.available(tmp_path) == 0


def test_what_cannot_be_read_is_ignored(tmp_path):
    member(tmp_path, "nonsense\n")
    group(tmp_path / HOMES[2], 2, "a lot", 1)
    group(tmp_path / HOMES[1], 1, 10**9, 1, "total_inactive_file much\n")
    assert memory.available(tmp_path) == 10**9 - 1
    (tmp_path / HOMES[1] / USED[1]).unlink()
    assert memory.available(tmp_path) == MACHINE


def test_copies_of_a_live_model_are_made_within_the_limit(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(transaction, "available", lambda: 1000)
    assert not transaction.Transaction(model, model.model.layers, None).atomic
