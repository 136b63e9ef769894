"""Which folders are which packages; everything else is in pyproject.toml.

eval/ and recipes/ lie at the top of the repository, where they are easy to find, and are installed
inside the package: top-level packages of these names would clash with other people's folders.
Benchmarks (eval/bench) belong to the repository, not to the wheel.
"""

from setuptools import find_packages, setup

_ROOTS = {"compress": "compress", "compress.eval": "eval", "compress.recipes": "recipes"}
_LEFT_OUT = ("bench", "bench.*")

setup(
    packages=[
        name
        for package, folder in _ROOTS.items()
        for name in (
            package,
            *(f"{package}.{part}" for part in find_packages(folder, exclude=_LEFT_OUT)),
        )
    ],
    package_dir=_ROOTS,
)
