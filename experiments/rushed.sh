#!/usr/bin/env bash
# Plain AltSDP beside the explicit projection in a tenth of the steps:
# bash experiments/rushed.sh DIRECTORY_WITH_MNIST_NPZ_AND_CIFAR10_JPEG_TAR_XZ
set -euo pipefail
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}  # made by `make demo`
data_dir=$1
train() {  # data set, method, estimate, what else it needs
  for seed in 0 1 2; do
    "$PYTHON" -m experiments.train --data-dir "$data_dir" --dataset "$1" --method "$2" \
      --seed $seed --out "runs/rushed-$1-$3-seed$seed" "${@:4}"
  done
}
mnist() { train mnist "$@" --epochs 3; }
cifar10() {
  train cifar10 "$@" --epochs 2 --downscale 2 --model conv \
    --widths 32 32 64 64 128 128 256 --learning-rate 0.05 --schedule cosine --momentum 0.9
}
mnist sgd sgd
mnist altsdp none --sparsity 0.5
mnist altsdp svd --sparsity 0.5 --valley svd
mnist altsdp svd-long --sparsity 0.5 --valley svd --valley-decay 0.99
mnist altsdp frequent --sparsity 0.5 --valley frequent_directions --valley-decay 0.99
mnist altsdp oja --sparsity 0.5 --valley oja
mnist altsdp hessian --sparsity 0.5 --valley hessian --valley-every 200
cifar10 altsdp none --sparsity 0.5
cifar10 altsdp svd --sparsity 0.5 --valley svd
"$PYTHON" -m experiments.table runs/rushed-mnist-* runs/rushed-cifar10-*
