#!/usr/bin/env bash
# Every method on the embedded encoder (about twelve minutes a seed on two cores), or on the embedded
# language model with MODEL=smollm2-135m (hours): trained on BBC headlines, evaluated on held-out
# headlines and, as the shifted test set, on the bodies of the same articles. Three seeds; ends with
# the report: tables on the terminal, checkpoints/compare/report/report.html. A finished run is
# skipped, an interrupted one resumed.
#   SEEDS="1 2 3" STEPS=160 TRAIN_ROWS=200 TEST_ROWS=200 MODEL=minilm-l6 bash scripts/compare.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
MODEL="${MODEL:-minilm-l6}"
SEEDS="${SEEDS:-1 2 3}"
STEPS="${STEPS:-160}"
TRAIN_ROWS="${TRAIN_ROWS:-200}" # few, so that there is something to over-fit
TEST_ROWS="${TEST_ROWS:-200}"
TYPE=bertds
[[ "$MODEL" == minilm-l6 ]] || TYPE=mcdataset
OUT="checkpoints/compare"
COMMON=(--dataset-type "$TYPE" --model "$MODEL" --output-dir "$OUT" --max-seq-len 96
    --limit-eval "$TEST_ROWS" --ood-datasets bbc_bodies --nowand --resume)
TRAIN=(--dataset bbc_headlines --limit-train "$TRAIN_ROWS" --max-train-steps "$STEPS" --batch-size 8
    --lr 1e-3 --eval-per-steps 0 --checkpoint)

train() { # NAME METHOD SEED FLAGS...
    local name="$1-seed$3" method="$2" seed="$3"
    shift 3
    echo "== $name"
    "$PYTHON_BIN" main.py "${COMMON[@]}" "${TRAIN[@]}" --modelwrapper "$method" --seed "$seed" \
        --log-path "$name" "$@"
}

post_hoc() { # NAME METHOD SEED BASE FLAGS...
    local name="$1-seed$3" method="$2" seed="$3" base="$4-seed$3"
    shift 4
    echo "== $name"
    "$PYTHON_BIN" main.py "${COMMON[@]}" --modelwrapper "$method" --seed "$seed" --log-path "$name" \
        --load-lora-path "$OUT/map/$MODEL/bbc_headlines/$base" --checkpoint "$@"
}

for seed in $SEEDS; do
    train mle mle "$seed"
    train map map "$seed" --opt-wd 1e-2
    train map-temperature map "$seed" --opt-wd 1e-2 --temperature-scaling
    train mcdropout mcdropout "$seed"
    train deepensemble deepensemble "$seed"
    train blob blob "$seed" --bayes-klreweighting --bayes-kllr 0.01
    post_hoc laplace laplace "$seed" map
    # on the adapter that has not seen the rows which the prior precision is chosen by
    post_hoc laplace-validation laplace "$seed" map-temperature --laplace-prior-precision validation
    post_hoc tfb tfb "$seed" map
done
"$PYTHON_BIN" scripts/report.py "$OUT"
