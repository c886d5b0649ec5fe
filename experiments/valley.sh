#!/usr/bin/env bash
# The tables of the valley in docs/studies.md:
# bash experiments/valley.sh DIRECTORY_WITH_MNIST_NPZ_AND_CIFAR10_JPEG_TAR_XZ
set -euo pipefail
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}  # made by `make demo`
train() { "$PYTHON" -m experiments.train --data-dir "$1" --out "runs/valley-$2" "${@:3}"; }
mnist() { train "$1" "mnist-$2" --dataset mnist "${@:3}"; }
cifar10() {
  train "$1" "cifar10-$2" --dataset cifar10 --downscale 2 --model conv \
    --widths 32 32 64 64 128 128 256 --epochs 15 --learning-rate 0.05 \
    --schedule cosine --momentum 0.9 "${@:3}"
}
mnist "$1" sgd --method sgd
mnist "$1" altsdp --method altsdp --c 0.08 --mu 0.6
mnist "$1" altsdp-target --method altsdp --sparsity 0.5
mnist "$1" prox --method prox_sgd --penalty 0.001
mnist "$1" other --method sgd --seed 1
cifar10 "$1" sgd --method sgd
cifar10 "$1" altsdp-target --method altsdp --sparsity 0.5
cifar10 "$1" prox --method prox_sgd --penalty 0.03
cifar10 "$1" other --method sgd --seed 1
check() {
  "$PYTHON" -m experiments.valley "runs/valley-$2-sgd" --data-dir "$1" \
    --other "runs/valley-$2-other" --out "runs/valley-$2-certificates" --pruned "${@:3}"
}
check "$1" mnist runs/valley-mnist-altsdp runs/valley-mnist-altsdp-target \
  runs/valley-mnist-prox
check "$1" cifar10 runs/valley-cifar10-altsdp-target runs/valley-cifar10-prox
