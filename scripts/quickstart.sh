#!/usr/bin/env bash
# From nothing to a Bayesian posterior beside plain LoRA, on a laptop without GPU or hub.
# Sets itself up, then trains plain LoRA (MAP) and BLoB on the same 80 BBC headlines, long enough that
# plain LoRA over-fits as people's runs do, and prints both rows for 200 held-out headlines and
# where the report (tables, plots, one HTML page) is. The model is SmolLM2-135M, embedded in a PyPI
# wheel. About eight minutes on two cores after set-up.
#   STEPS=80 bash scripts/quickstart.sh     # fewer updates: less over-fitting, less to gain
#   SEEDS="1 2 3" bash scripts/quickstart.sh
#       # a run for each seed instead, and for how many of them BLoB is better; quickstart_seeds.sh has ten
set -euo pipefail
[[ -n "${PYTHON_BIN:-}" ]] || source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STEPS="${STEPS:-160}"
MODEL="${MODEL:-smollm2-135m}"
OUT="${OUT:-checkpoints}"
COMMON=(--dataset-type mcdataset --dataset bbc_headlines --model "$MODEL" --output-dir "$OUT"
    --limit-train 80 --limit-eval 200 --max-train-steps "$STEPS" --batch-size 4 --lr 1e-3
    --eval-per-steps 0 --checkpoint --nowand)
BLOB=(--bayes-klreweighting --bayes-kllr 0.01 --bayes-eval-n-samples-final 5)
FOLDERS=("$OUT"/{map,blob}"/$(basename "$MODEL")/bbc_headlines")

if [[ -n "${SEEDS:-}" ]]; then
    # a finished run is skipped, an interrupted one resumed
    for seed in $SEEDS; do
        RUN=("${COMMON[@]}" --seed "$seed" --log-path "quickstart-seed$seed" --resume)
        echo "== MAP, seed $seed"
        "$PYTHON_BIN" main.py --modelwrapper map "${RUN[@]}"
        echo "== BLoB, seed $seed"
        "$PYTHON_BIN" main.py --modelwrapper blob "${RUN[@]}" "${BLOB[@]}"
    done
    RUNS=()
    for folder in "${FOLDERS[@]}"; do
        for seed in $SEEDS; do RUNS+=("$folder/quickstart-seed$seed"); done
    done
    "$PYTHON_BIN" scripts/report.py "${RUNS[@]}" --by-seed --out "$OUT/quickstart-seeds-report"
    exit
fi

COMMON+=(--log-path quickstart --overwrite)
echo "== 1/2 MAP: plain LoRA, $STEPS updates of SmolLM2-135M on 80 headlines"
"$PYTHON_BIN" main.py --modelwrapper map "${COMMON[@]}"
echo "== 2/2 BLoB: the same with a Gaussian posterior on the adapter, five draws at prediction"
"$PYTHON_BIN" main.py --modelwrapper blob "${COMMON[@]}" "${BLOB[@]}"

"$PYTHON_BIN" scripts/report.py "${FOLDERS[@]/%//quickstart}" --out "$OUT/quickstart-report"
