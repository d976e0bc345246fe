"""What pyproject.toml cannot say: files of the wheel that a clone has elsewhere.

The recipes in recipes/configs are the package data of timm_lowrank.configs; the list hub/checkpoints.yaml stands beside
timm_lowrank.checkpoint.listed, without the weights.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithList(build_py):
    """Copies the list of checkpoints into the wheel; an editable installation reads it in the clone."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "timm_lowrank", "checkpoint", "checkpoints.yaml")
            self.copy_file("hub/checkpoints.yaml", str(target))


setup(
    packages=[*find_packages(include=["timm_lowrank*"]), "timm_lowrank.configs"],
    package_dir={"timm_lowrank.configs": "recipes/configs"},
    cmdclass={"build_py": BuildWithList},
)
