#!/usr/bin/env bash
# The MNIST table of docs/studies.md: bash experiments/mnist.sh DIRECTORY_WITH_MNIST_NPZ
set -euo pipefail
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}  # made by `make demo`
train() { "$PYTHON" -m experiments.train --dataset mnist --data-dir "$1" "${@:2}"; }
for seed in 0 1 2; do
  train "$1" --seed $seed --method sgd
  train "$1" --seed $seed --method altsdp --c 0.08 --mu 0.6
  train "$1" --seed $seed --method prox_sgd --penalty 0.001
  train "$1" --seed $seed --method prox_sgd --penalty 0.003
  train "$1" --seed $seed --method sgd --widths 72 48 --out runs/mnist-small-seed$seed
done
"$PYTHON" -m experiments.table runs/mnist-dnn-sgd-* runs/mnist-dnn-altsdp-c* \
  runs/mnist-dnn-prox* runs/mnist-small-*
