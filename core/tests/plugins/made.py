"""Plugins made for tests: descriptors, plugin objects, and distributions written into a folder as an installer would."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from paddock.config import Environment
from paddock.plugins import ModelSpec, hookimpl
from paddock.plugins.hookspecs import GROUP
from paddock.plugins.host import PluginHost
from paddock.plugins.registry import Registry

MODEL_PLUGIN = """
from paddock.plugins import ModelSpec, hookimpl

@hookimpl
def paddock_models():
    references = dict(parse_config="m:p", weights="m:w", attention="m:a", build="m:b")
    return [ModelSpec(name="{name}", architectures={architectures!r}, **references)]
"""


def model(*architectures: str) -> ModelSpec:
    """Return a model that serves those architectures."""
    return ModelSpec(
        name="made", architectures=architectures, parse_config="made:p", weights="made:w", attention="made:a", build="made:b"
    )


def model_source(*architectures: str, name: str = "made") -> str:
    """Return the source of a plugin module that brings such a model."""
    return MODEL_PLUGIN.format(name=name, architectures=architectures)


class Bringing:
    """A plugin object that brings the given models."""

    def __init__(self, *models: Any) -> None:
        """Keep what to bring."""
        self.models = models

    @hookimpl
    def paddock_models(self) -> Sequence[Any]:
        """Return them."""
        return self.models


class Site:
    """A folder of installed distributions, first on the path."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        """Make the folder and put it on the path."""
        self.folder, self._patch = folder, patch
        self.path: list[str] = []
        self._at("site")

    def install(
        self,
        distribution: str,
        source: str = "",
        *,
        version: str = "1.0",
        plugin: str = "",
        module: str = "",
        requires: Sequence[str] = (),
        at: str = "site",
    ) -> Path:
        """Write a distribution with one plugin, whose module has that source; return its metadata folder."""
        plugin = plugin or distribution
        module = module or f"{distribution}_{version}_{at}".replace("-", "_").replace(".", "_")
        folder = self._at(at)
        (folder / f"{module}.py").write_text(source)
        metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (metadata / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), "", ""]))
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{plugin} = {module}\n")
        return metadata

    def collect(
        self, *, only: tuple[str, ...] | None = None, prefer: Mapping[str, str] | None = None, strict: bool = False
    ) -> Registry:
        """Return what the host makes of this folder alone."""
        host = PluginHost(path=tuple(self.path), environment=Environment(plugins=only), prefer=prefer or {}, strict=strict)
        return host.collect()

    def _at(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir(parents=True)
            self.path.append(str(folder))
            self._patch.setattr(sys, "path", [*self.path, *(entry for entry in sys.path if entry not in self.path)])
            importlib.invalidate_caches()
        return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Return an empty folder to install plugins into; their modules are forgotten afterwards."""
    before = set(sys.modules)
    yield Site(tmp_path, monkeypatch)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def given(*plugins: object, prefer: Mapping[str, str] | None = None, strict: bool = False) -> Registry:
    """Return what the host makes of these objects and the core alone."""
    host = PluginHost(plugins=plugins, autoload=False, environment=Environment(), prefer=prefer or {}, strict=strict)
    return host.collect()
