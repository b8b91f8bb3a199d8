#!/usr/bin/env bash
# BLoB with N = 0: the same runs, predicted with the posterior mean.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
NUM_PROCESSES=1 NAME=blob-mean
llama_all blob "${BLOB_LLAMA[@]}" --bayes-inference-notsample
