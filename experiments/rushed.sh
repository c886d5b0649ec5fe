#!/usr/bin/env bash
# Plain AltSDP beside the explicit projection in a tenth of the steps:
# bash experiments/rushed.sh DIRECTORY_WITH_MNIST_NPZ_AND_CIFAR10_JPEG_TAR_XZ
set -euo pipefail
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}  # made by `make demo`
train() { "$PYTHON" -m experiments.train --data-dir "$1" --method altsdp --sparsity 0.5 "${@:2}"; }
for seed in 0 1 2; do
  for valley in none svd frequent_directions oja hessian; do
    every=1; if [ $valley = hessian ]; then every=100; fi
    train "$1" --seed $seed --valley $valley --valley-every $every \
      --dataset mnist --epochs 3 --out runs/rushed-mnist-$valley-seed$seed
  done
  for valley in none svd hessian; do
    every=1; if [ $valley = hessian ]; then every=100; fi
    train "$1" --seed $seed --valley $valley --valley-every $every \
      --dataset cifar10 --downscale 2 --model conv --widths 32 32 64 64 128 128 256 \
      --epochs 2 --learning-rate 0.05 --schedule cosine --momentum 0.9 \
      --out runs/rushed-cifar10-$valley-seed$seed
  done
done
"$PYTHON" -m experiments.table runs/rushed-mnist-* runs/rushed-cifar10-*
