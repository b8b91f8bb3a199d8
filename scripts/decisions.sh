#!/usr/bin/env bash
# What sets and bounded answers are worth, on the embedded encoder: five methods on 300 BBC headlines,
# calibrated on 200 others, evaluated on all test headlines and, as shifted rows, on the bodies of the
# test articles. Three seeds, about fifteen minutes on two cores. Ends with the report (coverage, set
# sizes, answered shares) and with 200 other divisions of the test headlines into calibration and
# test rows. A finished run is skipped, an interrupted one resumed.
#   SEEDS="1 2 3" STEPS=160 bash scripts/decisions.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
SEEDS="${SEEDS:-1 2 3}"
STEPS="${STEPS:-160}"
OUT="checkpoints/decisions"
RUNS="$OUT/RUN/minilm-l6/bbc_headlines" # RUN is a method
COMMON=(--dataset-type bertds --model minilm-l6 --output-dir "$OUT" --dataset bbc_headlines
    --ood-datasets bbc_bodies --max-seq-len 96 --limit-train 500 --held-out-fraction 0.4
    --calibrate auto --nowand --resume)

run() { # METHOD SEED FLAGS...
    local method="$1" seed="$2"
    shift 2
    echo "== $method, seed $seed"
    "$PYTHON_BIN" main.py "${COMMON[@]}" --modelwrapper "$method" --seed "$seed" \
        --log-path "seed$seed" "$@"
}

TRAIN=(--max-train-steps "$STEPS" --batch-size 8 --lr 1e-3 --eval-per-steps 0)
for seed in $SEEDS; do
    run mle "$seed" "${TRAIN[@]}"
    run mcdropout "$seed" "${TRAIN[@]}"
    run deepensemble "$seed" "${TRAIN[@]}"
    run blob "$seed" "${TRAIN[@]}" --bayes-klreweighting --bayes-kllr 0.01
    run laplace "$seed" --load-lora-path "${RUNS/RUN/mle}/seed$seed"
done
"$PYTHON_BIN" scripts/report.py "$OUT"
"$PYTHON_BIN" benchmarks/bench_decisions.py "$OUT"/*/minilm-l6/bbc_headlines/seed*
