#!/usr/bin/env bash
# Plain AltSDP beside the explicit projection in a tenth of the steps:
# bash experiments/rushed.sh DIRECTORY_WITH_MNIST_NPZ_AND_CIFAR10_JPEG_TAR_XZ
set -euo pipefail
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}  # made by `make demo`
train() {  # directory, data set, method, seed, estimate, what else it needs
  "$PYTHON" -m experiments.train --data-dir "$1" --dataset "$2" --method "$3" \
    --seed "$4" --out "runs/rushed-$2-$5-seed$4" "${@:6}"
}
mnist() { train "$1" mnist "${@:2}" --epochs 3; }
cifar10() {
  train "$1" cifar10 "${@:2}" --epochs 2 --downscale 2 --model conv \
    --widths 32 32 64 64 128 128 256 --learning-rate 0.05 --schedule cosine --momentum 0.9
}
for seed in 0 1 2; do
  for data in mnist cifar10; do
    $data "$1" sgd $seed sgd
    run() { $data "$1" altsdp $seed "$2" --sparsity 0.5 "${@:3}"; }
    run "$1" none
    run "$1" svd-short --valley svd
    run "$1" hessian --valley hessian --valley-every 200
  done
  data=mnist
  run "$1" radial --dual radial
  run "$1" svd-long --valley svd --valley-decay 0.99
  run "$1" oja --valley oja
  run "$1" frequent --valley frequent_directions --valley-rank 16 --valley-decay 0.99
done
"$PYTHON" -m experiments.table runs/rushed-mnist-* runs/rushed-cifar10-*
