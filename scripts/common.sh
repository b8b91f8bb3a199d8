#!/usr/bin/env bash
# Shared by the scripts of all methods: which runs there are and how one is launched. Set in the
# environment to override:
#   MODEL           hub id, local folder or embedded alias
#   DATASETS SEEDS  lists separated by spaces
#   NUM_PROCESSES   processes of one run, on as many GPUs (1)
#   LAUNCH_CONFIG   accelerate's, for several processes (configs/accelerate/ddp.yaml); fsdp.yaml needs
#                   QUANTIZATION=none
#   QUANTIZATION    none, 8bit or 4bit        DATA_DIR   folder of folders with local rows
#   STEPS           batches of one process's size that a run sees (5000); OUTPUT_DIR where runs are kept
#   EXTRA           further flags for every run
#   DRY_RUN=1       print the commands only
# A finished run is skipped, an interrupted one is resumed.
# The published loop counts batches before they are shared out, so that k processes make STEPS / k updates
# of k batches each: 2,500 of 8 rows in its Llama runs on two GPUs, 1,250 of 128 in its RoBERTa runs on
# four. So it is here: NUM_PROCESSES changes the size of an update, not how many rows a run sees.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
[[ -x "$ROOT/.venv/bin/python" ]] && PYTHON_DEFAULT="$ROOT/.venv/bin/python" || PYTHON_DEFAULT=python
PYTHON_BIN="${PYTHON_BIN:-$PYTHON_DEFAULT}"
SEEDS="${SEEDS:-1 2 3}"
STEPS="${STEPS:-5000}"
NUM_PROCESSES="${NUM_PROCESSES:-1}"
LAUNCH_CONFIG="${LAUNCH_CONFIG:-configs/accelerate/ddp.yaml}"
[[ "$NUM_PROCESSES" =~ ^[1-9][0-9]{0,3}$ ]] || {
    echo "NUM_PROCESSES is '$NUM_PROCESSES'; it must be a number of processes, such as 2" >&2
    exit 2
}

updates() { # of NUM_PROCESSES batches each, for STEPS batches in all
    echo $(((STEPS + NUM_PROCESSES - 1) / NUM_PROCESSES))
}

# folder METHOD DATASET NAME: where main.py keeps that run; a local model stands under its last name.
folder() {
    local model="$MODEL"
    [[ ! -d "$model" ]] || model="$(basename "$(realpath "$model")")"
    echo "${OUTPUT_DIR:-checkpoints}/$1/$model/${2##*:}/$3"
}

# run DATASET FLAGS...: one run, launched, resumed or skipped; prints it with DRY_RUN.
run() {
    local dataset="$1" command=("$PYTHON_BIN")
    shift
    ((NUM_PROCESSES == 1)) || command+=(-m accelerate.commands.launch
        --config_file "$LAUNCH_CONFIG" --num_processes "$NUM_PROCESSES")
    command+=(main.py --dataset "$dataset" --model "$MODEL" --quantization "$QUANTIZATION" "$@" --resume)
    [[ -z "${DATA_DIR:-}" ]] || command+=(--data-dir "$DATA_DIR")
    [[ -z "${OUTPUT_DIR:-}" ]] || command+=(--output-dir "$OUTPUT_DIR")
    # shellcheck disable=SC2206  # EXTRA is a list of flags
    command+=(${EXTRA:-})
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

llama_settings() {
    MODEL="${MODEL:-meta-llama/Llama-2-7b-hf}"
    QUANTIZATION="${QUANTIZATION:-8bit}"
    DATA=(--dataset-type mcdataset --max-seq-len 300)
    COMMON=("${DATA[@]}" --model-type causallm --apply-classhead-lora --lora-r 8 --lora-alpha 16
        --lr 1e-4 --batch-size 4 --warmup-ratio 0.06
        --max-train-steps "$(updates)" --eval-per-steps 0 --checkpoint)
}

roberta_settings() {
    MODEL="${MODEL:-FacebookAI/roberta-base}"
    QUANTIZATION="${QUANTIZATION:-none}"
    DATA=(--dataset-type bertds --max-seq-len 256)
    COMMON=("${DATA[@]}" --model-type seqcls --apply-classhead-lora --lora-r 8 --lora-alpha 8
        --lr 5e-4 --batch-size 32 --warmup-ratio 0.06
        --max-train-steps "$(updates)" --eval-per-steps 0 --checkpoint)
}

LLAMA_DATASETS="winogrande_s ARC-Challenge ARC-Easy winogrande_m obqa boolq"
ROBERTA_DATASETS="rte mrpc wic cola boolq"
SHIFTED_DATASETS="ARC-Challenge ARC-Easy MMLU-chem MMLU-phy"

# sweep METHOD FLAGS...: every data set and seed, with the settings chosen before.
sweep() {
    local method="$1" dataset seed name
    shift
    for dataset in $DATASETS; do
        for seed in $SEEDS; do
            name="${NAME:-$method}-${dataset##*:}-seed$seed"
            run "$dataset" --modelwrapper "$method" "${COMMON[@]}" --seed "$seed" \
                --log-path "$name" --wandb-name "$name" "$@"
        done
    done
}

llama_all() { # METHOD FLAGS...
    llama_settings
    DATASETS="${DATASETS:-$LLAMA_DATASETS}"
    sweep "$@"
}

roberta_all() { # METHOD FLAGS...
    roberta_settings
    DATASETS="${DATASETS:-$ROBERTA_DATASETS}"
    sweep "$@"
}

# Train on SOURCE, then evaluate that adapter on each of DATASETS.
llama_ood_all() { # METHOD FLAGS...
    local method="$1" shifted source="${SOURCE:-obqa}" seed name
    llama_settings
    shifted="${DATASETS:-$SHIFTED_DATASETS}"
    DATASETS="$source" sweep "$@"
    shift
    STEPS=0 llama_settings
    for dataset in $shifted; do
        for seed in $SEEDS; do
            name="$method-${source##*:}-seed$seed"
            run "$dataset" --modelwrapper "$method" "${COMMON[@]}" \
                --seed "$seed" --log-path "$name-on-${dataset##*:}" --wandb-name "$name-on-${dataset##*:}" \
                --load-lora-path "$(folder "$method" "$source" "$name")" \
                --ood-ori-dataset "$source" "$@"
        done
    done
}

# post_hoc METHOD BASE FLAGS...: METHOD on the adapters that BASE's sweep left, with the settings
# chosen before.
post_hoc() {
    local method="$1" base="${BASE:-$2}" dataset seed name
    shift 2
    for dataset in $DATASETS; do
        for seed in $SEEDS; do
            name="$base-${dataset##*:}-seed$seed"
            run "$dataset" --modelwrapper "$method" "${DATA[@]}" --seed "$seed" \
                --load-lora-path "$(folder "$base" "$dataset" "$name")" \
                --log-path "$method-$name${SUFFIX:-}" --wandb-name "$method-$name${SUFFIX:-}" \
                --checkpoint "$@"
        done
    done
}

llama_post_hoc() { # METHOD BASE FLAGS...
    llama_settings
    DATASETS="${DATASETS:-$LLAMA_DATASETS}"
    post_hoc "$@"
}

roberta_post_hoc() { # METHOD BASE FLAGS...
    roberta_settings
    DATASETS="${DATASETS:-$ROBERTA_DATASETS}"
    post_hoc "$@"
}

# The posterior is fitted on SOURCE's rows and evaluated on DATASETS in the same run: a block for each
# in its metrics.json.
llama_ood_post_hoc() { # METHOD BASE FLAGS...
    local shifted="${DATASETS:-$SHIFTED_DATASETS}"
    llama_settings
    # shellcheck disable=SC2086  # a list of names
    SUFFIX=-ood DATASETS="${SOURCE:-obqa}" post_hoc "$@" --ood-datasets $shifted
}

# The published hyper-parameters of BLoB; only the KL's learning rate differs.
BLOB=(--bayes-eps 0.05 --bayes-beta 0.2 --bayes-gamma 8 --bayes-klreweighting
    --bayes-datasetrescaling --bayes-eval-n-samples-final 10)
BLOB_LLAMA=("${BLOB[@]}" --bayes-kllr 0.01)
BLOB_ROBERTA=("${BLOB[@]}" --bayes-kllr 0.002)
