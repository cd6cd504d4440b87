import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastblocks/__init__.py").read_text(), re.MULTILINE)[1]

# Models whose blocks `fastblocks.convert` swaps, at the versions that its adapters are tested against.
ADAPTERS = [
    "bs-roformer==1.2.4",
    "rotary-embedding-torch==0.9.1",
    "timm==1.0.31",
    "vocos==0.1.0",
    "x-transformers==2.31.10",
]
BENCH = ["rich>=13", "matplotlib>=3.8", "soundfile>=0.12"]
TEST = [
    *BENCH,
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3",
    "hypothesis>=6.100",
    "librosa>=0.10",
    "ruff>=0.6",
]

setup(
    name="fastblocks-audio",  # `fastblocks` is another project's distribution name
    version=VERSION,
    description="Drop-in building blocks of neural audio models, with fused Triton kernels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="The fastblocks authors",
    keywords="pytorch triton audio attention gru lstm convnext gan discriminator",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Sound/Audio",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["fastblocks", "fastblocks.*"]),
        "fastblocks.kernels",
        *(f"fastblocks.kernels.{name}" for name in find_packages("kernels")),
    ],
    # A top-level package called `kernels` would overwrite Hugging Face's package of that name.
    package_dir={"fastblocks.kernels": "kernels"},
    package_data={"fastblocks": ["py.typed"]},
    # Up to the last version that .ci/versions tries; each PyTorch wants one Triton, so its cap is this one.
    install_requires=["torch>=2.8", "numpy", 'triton>=3.4,<3.10; platform_system == "Linux"'],
    extras_require={"adapters": ADAPTERS, "bench": BENCH, "test": TEST},
)
