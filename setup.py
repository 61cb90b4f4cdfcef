"""Requirements, extras and classifiers from settings.ini; everything else stands in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

suffix = "_requirements"
config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    packages=find_packages(include=["fastai_compile", "fastai_compile.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in settings.items() if k.endswith(suffix)},
    classifiers=settings["classifiers"].strip().splitlines(),
)
