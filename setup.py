"""Packages; pyproject.toml has the rest. `configs/` is installed as `mmsr1_jax/configs/`."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["mmsr1_jax*"]), "mmsr1_jax.configs"],
    package_dir={"mmsr1_jax.configs": "configs"},
)
