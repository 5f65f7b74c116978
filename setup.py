"""The C++ extensions; everything else about the package is in pyproject.toml."""

import runpy
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HELPERS = "megatron.core.datasets.helpers_cpp"
KERNELS = "megatron.core.fusions.kernels.cpu.kernels_cpp"
WITHOUT = {HELPERS: "building data set indices", KERNELS: "training on a CPU"}
_KERNEL_FILES = Path("megatron/core/fusions/kernels/cpu")


class OptionalBuild(build_ext):
    """Builds the extensions where there is a compiler, and says what is lost where there is none."""

    def run(self) -> None:
        super().run()
        for extension, slower in WITHOUT.items():
            if not Path(self.build_lib, self.get_ext_filename(extension)).exists():
                print(
                    f"warning: {extension} could not be compiled (is a C++ compiler installed?). "
                    f"Everything works without it, but {slower} is slower.",
                    file=sys.stderr,
                )


setup(
    ext_modules=[
        Pybind11Extension(HELPERS, ["megatron/core/datasets/helpers.cpp"], cxx_std=17, optional=True),
        Pybind11Extension(
            KERNELS,
            [str(_KERNEL_FILES / "module.cpp")],
            depends=[str(path) for path in sorted(_KERNEL_FILES.glob("*.[hp]*"))],
            define_macros=[("SOURCES", f'"{runpy.run_path(str(_KERNEL_FILES / "sources.py"))["checksum"]()}"')],
            extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
            cxx_std=17,
            optional=True,
        ),
    ],
    # the checksum is computed again where the extension is loaded
    package_data={"megatron.core.fusions.kernels.cpu": ["*.cpp", "*.h"]},
    cmdclass={"build_ext": OptionalBuild},
)
