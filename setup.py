"""Package metadata. `constraints.txt` pins the exact versions that were tested."""

from setuptools import find_packages, setup

setup(
    name="megatron_keye",
    version="0.1.0",
    description="Train Keye-VL-class vision-language models on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_keye", "megatron_keye.*"]),
    package_data={"megatron_keye.recipes": ["*.yaml"]},
    entry_points={"console_scripts": ["keye = megatron_keye.train.cli:main"]},
    install_requires=[
        "torch>=2.13",
        "megatron-core==0.16.1",
        "jinja2>=3.1.6",
        "numpy",
        "pyyaml",
        "pydantic>=2.7",
        "annotated-types",
        "transformers>=5.23",
        "tokenizers",
        "safetensors",
        "aiohttp",
        "av",
        "fsspec",
        "h11>=0.16",
        "opencv-python-headless",
        "pillow",
        "simplejpeg",
        "webdataset",
        "xxhash",
        "tensorboard",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        "s3": ["s3fs"],  # data sets at s3:// URLs; other stores have fsspec packages of their own
        "dali": ["nvidia-dali-cuda120"],
        "fast": ["numba"],  # fast resizing and decode workers without torch; compiled planning, worth it from hundreds of replicas on
        # In an environment of its own: these want older versions of what constraints.txt pins. mosaicml-streaming cannot be listed, as it
        # asks for numpy < 2.2 and transformers < 5; benchmarks/resume.py measures it where it can be imported all the same.
        "benchmarks": ["megatron-energon", "torchdata", "numba"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "keye-vl-utils==1.5.2", "einops", "numba"],
    },
)
