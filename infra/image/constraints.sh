#!/usr/bin/env bash
# Resolves the versions that images hold anew: infra/image/constraints.sh (needs `pip install uv`).
# They serve both builds of torch: what only CUDA needs is not installed beside the CPU's.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv pip compile pyproject.toml infra/image/mlflow.txt --upgrade \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-annotate --custom-compile-command infra/image/constraints.sh \
    --output-file infra/image/constraints.txt --quiet
