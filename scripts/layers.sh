#!/usr/bin/env bash
# What --lora-layers does to calibration: plain LoRA (MAP) and BLoB on all blocks of SmolLM2-135M, on the
# last 15 and on the last 8, trained on 80 BBC headlines as the quickstart does, three seeds. Each adapter
# is evaluated on 500 held-out headlines with its mean and with ten draws; those on the last 8 also with
# up to 32 draws, until they are settled, and with all 32. A bit more than an hour on two cores; ends with
# the report. A finished run is skipped, an interrupted one resumed.
#   SEEDS="1 2 3" LAYERS="all last:15 last:8" STEPS=160 bash scripts/layers.sh
#   PHASE=train bash scripts/layers.sh      # or PHASE=evaluate: one half of it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
SEEDS="${SEEDS:-1 2 3}"
LAYERS="${LAYERS:-all last:15 last:8}"
STEPS="${STEPS:-160}"
PHASE="${PHASE:-both}"
SETTLED="${SETTLED-last:8}" # where draws until they are settled are held against all 32
OUT="checkpoints/layers"
COMMON=(--dataset-type mcdataset --model smollm2-135m --dataset bbc_headlines --nowand --resume)

trained() { # METHOD LAYERS SEED: the folder of an adapter
    echo "$OUT/adapters/$1/smollm2-135m/bbc_headlines/${2/:/}-seed$3"
}

train() { # METHOD LAYERS SEED FLAGS...
    local method="$1" layers="$2" seed="$3"
    shift 3
    echo "== train $method, $layers, seed $seed"
    "$PYTHON_BIN" main.py "${COMMON[@]}" --output-dir "$OUT/adapters" --modelwrapper "$method" \
        --lora-layers "$layers" --seed "$seed" --log-path "${layers/:/}-seed$seed" \
        --limit-train 80 --max-train-steps "$STEPS" --batch-size 4 --lr 1e-3 --eval-per-steps 0 \
        --limit-eval 20 "$@"
}

evaluate() { # NAME METHOD LAYERS SEED FLAGS...
    local name="$1" method="$2" layers="$3" seed="$4"
    shift 4
    echo "== evaluate $name, $layers, seed $seed"
    "$PYTHON_BIN" main.py "${COMMON[@]}" --output-dir "$OUT/evaluated" --modelwrapper "$method" \
        --load-lora-path "$(trained "$method" "$layers" "$seed")" --seed "$seed" \
        --log-path "$name-${layers/:/}-seed$seed" --max-train-steps 0 "$@"
}

for seed in $SEEDS; do
    for layers in $LAYERS; do
        if [[ "$PHASE" != evaluate ]]; then
            train map "$layers" "$seed"
            train blob "$layers" "$seed" --bayes-klreweighting --bayes-kllr 0.01 \
                --bayes-eval-n-samples-final 1
        fi
        if [[ "$PHASE" != train ]]; then
            evaluate map map "$layers" "$seed"
            evaluate blob-mean blob "$layers" "$seed" --bayes-inference-notsample
            evaluate blob blob "$layers" "$seed" --bayes-eval-n-samples-final 10
            if [[ " $SETTLED " == *" $layers "* ]]; then
                # without signs draws are sets of weights: the first ones of both runs are the same
                evaluate blob-settled blob "$layers" "$seed" --flipout-eval none \
                    --bayes-eval-n-samples-final 32 --draws-adaptive
                evaluate blob-full blob "$layers" "$seed" --flipout-eval none \
                    --bayes-eval-n-samples-final 32
            fi
        fi
    done
done
if [[ "$PHASE" != train ]]; then
    "$PYTHON_BIN" scripts/report.py "$OUT/evaluated" --out "$OUT/report"
fi
