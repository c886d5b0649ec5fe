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
for data in mnist cifar10; do
  $data "$1" sgd --method sgd
  $data "$1" altsdp --method altsdp --sparsity 0.5
  penalty=0.001; if [ $data = cifar10 ]; then penalty=0.03; fi
  $data "$1" prox --method prox_sgd --penalty $penalty
  $data "$1" other --method sgd --seed 1
  "$PYTHON" -m experiments.valley runs/valley-$data-sgd --data-dir "$1" \
    --pruned runs/valley-$data-altsdp runs/valley-$data-prox \
    --other runs/valley-$data-other --out runs/valley-$data-certificates "${@:2}"
done
