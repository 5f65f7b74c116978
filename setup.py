"""The C++ extension; everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HELPERS = "megatron.core.datasets.helpers_cpp"


class OptionalBuild(build_ext):
    """Builds the extension where there is a compiler, and says what is lost where there is none."""

    def run(self) -> None:
        super().run()
        if not Path(self.build_lib, self.get_ext_filename(HELPERS)).exists():
            print(
                f"warning: {HELPERS} could not be compiled (is a C++ compiler installed?). "
                "Everything works without it, but building data set indices is slower.",
                file=sys.stderr,
            )


setup(
    ext_modules=[Pybind11Extension(HELPERS, ["megatron/core/datasets/helpers.cpp"], cxx_std=17, optional=True)],
    cmdclass={"build_ext": OptionalBuild},
)
