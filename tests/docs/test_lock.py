"""The locked versions fit pyproject.toml, on each Python that it allows."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.running import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = [Requirement(line.removesuffix(" \\")) for line in re.findall(r"^[a-z].*", LOCK, re.M)]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_dependency_is_locked_within_its_bounds(python: str, machine: str) -> None:
    place = {"python_version": python, "python_full_version": f"{python}.1"}
    place |= {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux"}
    versions: dict[str, str] = {}
    for locked in LOCKED:
        if locked.marker is None or locked.marker.evaluate(place):
            assert canonicalize_name(locked.name) not in versions
            versions[canonicalize_name(locked.name)] = str(locked.specifier).removeprefix("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        if wanted.marker is None or wanted.marker.evaluate(place):
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)], prereleases=True), wanted


def test_each_locked_package_has_hashes_and_no_address() -> None:
    assert len(re.findall(r" \\\n    --hash=sha256:[0-9a-f]{64}", LOCK)) >= len(LOCKED)
    for entry in re.split(r"\n(?=[a-z])", LOCK)[1:]:
        assert "--hash=sha256:" in entry
    assert "://" not in LOCK
