#!/usr/bin/env bash
# blob-llama-all.sh in one process, whatever NUM_PROCESSES says: M, the KL's cycle, counts one process's batches.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
NUM_PROCESSES=1
NAME=blob-single-gpu
llama_all blob "${BLOB_LLAMA[@]}"
