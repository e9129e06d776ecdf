# Run from the repository's root; DATA holds CIFAR-10 (here its JPEG-recompressed parquet files). About two hours on two cores.
set -e
DATA=${1:-data/cifar10}
train() {
  defquant train --model wrn-16-1 --data cifar10 --data-root "$DATA" --train-images 20000 --validation-images 5000 \
    --epochs 5 --batch-size 64 --lr 0.1 --schedule one-cycle --clip 1 --bits 4 --device cpu --resume "$@"
}
for w in 8 4; do
  train --out runs/deploy/vanilla4_w$w --weight-bits $w --deployable
  train --out runs/deploy/dq4_w$w --weight-bits $w --deployable --beta 0.3
done
train --out runs/deploy/vanilla4
train --out runs/deploy/dq4 --beta 0.3
for run in vanilla4_w8 dq4_w8 vanilla4_w4 dq4_w4 vanilla4 dq4; do
  defquant export runs/deploy/$run results/deploy/$run.onnx --data-root "$DATA" --attack fgsm pgd-20 \
    --eps 2/255 8/255 --attacked 1000 --queries 200 --few 200 --repeats 50 --threads 1
done
rm results/deploy/*.onnx
defquant report results/deploy --out results/deploy/report.html
