#!/bin/sh
# Files and data lie in ../shared/data. OMP_WAIT_POLICY: threads that wait leave the cores to others.
OMP_WAIT_POLICY=PASSIVE defquant judge ../shared/data/models/mlperf-tiny-resnet8-int8.onnx \
  --reference ../shared/data/models/mlperf-tiny-resnet8-float.onnx --data cifar10 \
  --data-root ../shared/data/cifar-10-batches-py --margin 5 --budget 30m --out results/judged
