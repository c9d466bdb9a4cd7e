"""Maps the repository's folders to import packages; everything else is in pyproject.toml.

Each stage is a top-level folder and imports as a part of `fasa_trt` (`export/` is `fasa_trt.export`).
pyproject.toml can map packages but only search for them where the folder already has the package's name.
"""

from setuptools import find_packages, setup

STAGES = ("calibrate", "export", "plugins")

staged = [f"fasa_trt.{name}" for stage in STAGES for name in find_packages(include=[stage, f"{stage}.*"])]

setup(
    packages=find_packages(include=["fasa_trt", "fasa_trt.*"]) + staged,
    package_dir={f"fasa_trt.{stage}": stage for stage in STAGES},
    include_package_data=False,  # only what is named here, not all that git tracks
    package_data={
        "fasa_trt": ["py.typed", "**/*.jinja", "**/*.html"],
        "fasa_trt.calibrate": ["text/*"],
        "fasa_trt.plugins": ["**/*.cu", "**/*.cuh", "**/*.cpp", "**/*.h", "**/CMakeLists.txt"],
    },
)
