"""Everything stands in pyproject.toml; this file is where the native extension's build will hook in."""

from setuptools import setup

setup()
