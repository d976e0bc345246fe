"""What pyproject.toml cannot say: the recipes in recipes/configs are the package data of timm_lowrank.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["timm_lowrank*"]), "timm_lowrank.configs"],
    package_dir={"timm_lowrank.configs": "recipes/configs"},
)
