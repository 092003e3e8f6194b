"""What launch.py does before anything else."""

import builtins
import io
import os
import sys

import pytest

import launch


@pytest.mark.parametrize(
    ("system", "environment", "again"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, False),
        (None, {}, False),
    ],
)
def test_it_starts_again_where_huge_pages_are_given_to_those_who_ask(monkeypatch, system, environment, again):
    def read(path, *_):
        assert path == "/sys/kernel/mm/transparent_hugepage/enabled"
        if system is None:
            raise FileNotFoundError(path)
        return io.StringIO(system)

    started = []
    environment = dict(environment)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "launch.py", "--json"])
    monkeypatch.setattr(builtins, "open", read)
    launch.ask_for_huge_pages()
    monkeypatch.undo()
    assert started == ([(sys.executable, [sys.executable, "-u", "launch.py", "--json"])] if again else [])
    if again:
        assert environment == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
