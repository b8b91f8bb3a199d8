#!/usr/bin/env bash
# From nothing to a fine-tuned language model and its calibration, on a laptop without GPU or hub.
# Sets itself up, fine-tunes SmolLM2-135M (embedded in a PyPI wheel) on BBC headlines, prints a table.
#   STEPS=80 bash scripts/quickstart.sh     # more updates
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

STEPS="${STEPS:-40}"
for method in map; do
    echo "== $method: $STEPS updates of SmolLM2-135M on bbc_headlines"
    "$PYTHON_BIN" main.py --modelwrapper "$method" \
        --dataset-type mcdataset --dataset bbc_headlines --model smollm2-135m \
        --max-train-steps "$STEPS" --batch-size 8 --lr 5e-4 \
        --checkpoint --log-path quickstart --overwrite --nowand
done
"$PYTHON_BIN" scripts/table.py checkpoints/map/smollm2-135m/bbc_headlines/quickstart
