"""Builds the kernels when the package is built (a hatchling build hook; see pyproject.toml).

A wheel gets the extension and is of this platform; an editable install gets it beside this file.  Where it cannot be built the
package is still built, without it, and says so: it then runs on `weft.ops.ref`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path("weft") / "native"
TOOLS = ("cmake", "ninja")


class KernelsBuildHook(BuildHookInterface):  # type: ignore[misc,type-arg]
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Packages to build with, beside those of pyproject.toml: what the machine does not have anyway."""
        return ["nanobind>=2.4", *(tool for tool in TOOLS if shutil.which(tool) is None)]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        source = Path(self.root) / HERE
        name = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.place = tempfile.TemporaryDirectory(prefix="weft-kernels-")
        try:
            built = compiled(source, Path(self.place.name), name)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or str(error)
            print(f"weft's kernels were not built, so it will run on plain PyTorch:\n{output[-4000:]}", file=sys.stderr)
            if version == "editable":  # what an earlier build left is of other sources, and would pass for this one's
                (source / name).unlink(missing_ok=True)
            return
        if version == "editable":
            shutil.copy2(built, source / name)
        else:
            build_data["force_include"][str(built)] = str(HERE / name)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "place"):
            self.place.cleanup()


def compiled(source: Path, place: Path, name: str) -> Path:
    """The extension, built in `place`.  Raises OSError or CalledProcessError, whose output says why it cannot be."""
    for command in (
        ["cmake", "-S", str(source), "-B", str(place), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(place)],
    ):
        subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return next(place.rglob(name))
