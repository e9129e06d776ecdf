#!/usr/bin/env bash
# Every number in this folder, from nothing: bash results/cifar10-first/commands.sh DATA_ROOT
# DATA_ROOT holds CIFAR-10 in any format that `defquant train --help` names.
set -euo pipefail
data=${1:?usage: commands.sh DATA_ROOT}
out=${2:-runs/cifar10-first}
export OMP_NUM_THREADS=1 # two runs at a time, one core each

train() { # NAME SEED FLAGS...
  local name=$1 seed=$2
  shift 2
  defquant train --preset cifar10-short --data-root "$data" --seed "$seed" "$@" \
    --out "$out/$name-s$seed" --resume
}
attack() { # RUN
  # one-step attacks on all 10,000 test images, longer ones on the first 2,000, the longest on 500
  defquant attack "$out/$1" --attack random fgsm --eps 1/255 2/255 4/255 8/255 --examples 0
  defquant attack "$out/$1" --attack pgd-20 pgd --eps 1/255 2/255 4/255 8/255 --images 2000
  defquant attack "$out/$1" --attack pgd-50x10 --eps 2/255 8/255 --images 500 --examples 0
}
one() { # NAME SEED FLAGS...
  train "$@" && attack "$1-s$2"
}
export -f train attack one
export data out

for seed in 0 1; do
  printf '%s\n' "float $seed" "vanilla-4bit $seed --bits 4" \
    "dq-4bit-0.01 $seed --bits 4 --beta 0.01" "dq-4bit-0.03 $seed --bits 4 --beta 0.03" \
    "dq-4bit-0.1 $seed --bits 4 --beta 0.1" "dq-float-0.03 $seed --beta 0.03"
done | xargs -P 2 -I{} bash -c 'one {}'
here=$(dirname "$0")
defquant report "$out" --out "$here/report.html" --markdown "$here/table.md" \
  --figure "$here/curves.png"
cat "$out"/*/results.jsonl > "$here/results.jsonl"
