"""Everything is declared in pyproject.toml; native code will hook in here."""

from setuptools import setup

setup()
