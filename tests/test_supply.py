"""Pins, hashes and the page about them say the same."""

from __future__ import annotations

import re

from conftest import ROOT


def pins(name: str) -> dict[str, str]:
    """Package and version of each line of a requirements file."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return {
        package.lower().replace("_", "-"): rest.split()[0]
        for package, rest in (line.split("==") for line in lines if line and not line.startswith("#"))
    }


def test_the_page_names_every_pin_with_its_version_and_licence():
    page = (ROOT / "docs" / "supply.md").read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([^|]+) \| [^|]+ \|$", page, re.M)
    told = {package.lower().replace("_", "-"): version for package, version, _ in rows if version[0].isdigit()}
    assert told == pins("requirements.txt")


def test_every_pin_but_torch_has_a_hash_of_its_version():
    hashed, direct = pins("requirements-hashed.txt"), pins("requirements.txt")
    assert direct.pop("torch") and "torch" not in hashed
    assert {package: hashed.get(package) for package in direct} == direct
    lines = (ROOT / "requirements-hashed.txt").read_text("utf-8").splitlines()
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in lines if not line.startswith("#"))


def test_the_page_names_what_they_need_in_turn_with_versions_and_licences():
    page = " ".join((ROOT / "docs" / "supply.md").read_text("utf-8").split())
    for package, version in pins("requirements-hashed.txt").items():
        row = re.search(rf"\| {package} \| {version} \| \S|\b{package} {re.escape(version)} \([^)]", page)
        assert row or package in pins("requirements.txt"), (package, version)
