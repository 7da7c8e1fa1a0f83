"""Finds the packages; everything else about the distribution is in pyproject.toml.

Four folders are installed under other names or beside each other, which a declarative list could only repeat by hand.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "moiie_export": "moiie_export",
    "moiie_plugins": "plugins",
    "moiie_recipes": "recipes",
    "moiie_runtime": "runtime",
}

setup(
    package_dir=FOLDERS,
    packages=[
        ".".join([package, *inner])
        for package, folder in FOLDERS.items()
        for inner in ([], *(name.split(".") for name in find_packages(folder)))
    ],
)
