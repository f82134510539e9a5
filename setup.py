"""Packaging: `pip install .` is all a user needs; the extras are for tests and for comparing with PyTorch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "mlx_starflow/__init__.py").read_text()).group(1)


def for_an_index(readme: str) -> str:
    """The README without its pictures and with links as plain text: a package index has no files beside it."""
    readme = re.sub(r"^!\[[^]]*\]\((?!https?:).*\)\n\n?", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", readme)


setup(
    name="mlx-starflow",
    version=VERSION,
    description="STARFlow, autoregressive normalizing flows for images and video, natively in MLX",
    long_description=for_an_index((HERE / "README.md").read_text()),
    long_description_content_type="text/markdown",
    license="MIT",
    # The embedded model was trained on pictures and names whose licence asks to be named.
    license_files=["LICENSE", "mlx_starflow/demo/model/NOTICE"],
    keywords=["mlx", "apple-silicon", "normalizing-flow", "starflow", "text-to-image", "text-to-video"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: End Users/Desktop",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["mlx_starflow", "mlx_starflow.*"]), "mlx_starflow.convert"],
    package_dir={"mlx_starflow.convert": "convert"},
    package_data={
        "mlx_starflow": [
            "py.typed",
            "*.pyi",
            "cpu/*.cpp",
            "cpu/*.h",
            "demo/model/*",
            "demo/model/*/*",
            "server/studio/*",
        ]
    },
    install_requires=[
        # PyPI's plain mlx has no backend on Linux: the CPU one is an extra there. Earlier versions are wrong in places:
        # causal masks of more than 32,767 positions on an M5 (0.31.1), nvfp4 (0.32.0), large 3-D convolutions (0.30).
        "mlx>=0.32.4; sys_platform == 'darwin'",
        "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
        # A fast BLAS for that CPU backend, which brings a slow one: see mlx_starflow/cpu/blas.py.
        "scipy-openblas32>=0.3.29; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "scipy-openblas32>=0.3.29; sys_platform == 'linux' and platform_machine == 'aarch64'",
        "numpy",
        "pillow",
        "click",
        "tqdm",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "huggingface-hub",
    ],
    extras_require={
        "cuda": ["mlx[cuda13]>=0.32.4; sys_platform == 'linux'"],  # see docs/cuda.md for what else it takes
        "finetune": ["mlx-lm"],  # its LoRA and DoRA layers; using adapters does not need it
        "heic": ["pillow-heif"],  # an iPhone's photos
        "tensorboard": ["tensorboardX"],  # --report-to tensorboard, without PyTorch or TensorFlow
        "wandb": ["wandb"],  # --report-to wandb
        "serve": ["fastapi>=0.110", "uvicorn>=0.30", "python-multipart>=0.0.18"],  # `mlx-starflow serve`
        "browser": ["playwright"],  # drives the studio in tests; the browser itself is Debian's chromium
        # What builds and checks wheel, sdist and documentation.
        "release": [
            "build",
            "twine",
            "mkdocs>=1.6",
            "mkdocs-material>=9.5,<10",
            "mkdocstrings[python]>=1",
            "pyright[nodejs]",
            "ruff",  # breaks the lines of long signatures
        ],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "mlx-lm",
            "av",
            "pillow-heif",
            "tensorboardX",
            "fastapi>=0.110",
            "uvicorn>=0.30",
            "python-multipart>=0.0.18",
            "httpx",
            "openai",  # its client talks to our server
            "scipy",  # formulas of evaluation are compared with it
        ],
        "torch": ["torch"],
        "video": ["av"],  # PyAV: MP4 and other video files
    },
    entry_points={"console_scripts": ["mlx-starflow = mlx_starflow.cli:main"]},
)
