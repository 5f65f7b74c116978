#!/usr/bin/env bash
# Trains a small Mixtral (0.9 billion parameters, 8 experts) on one GPU of 24 GB, from fresh weights.
#
#   CHECKPOINT_PATH=/ckpt/small TOKENIZER_MODEL=/hf/mixtral BLENDED_DATA=/data/text_document bash examples/one_gpu.sh
#
# Any variable of mixtral_4x7b_example.sh can be set too; arguments go to pretrain_gpt.py.
set -euo pipefail

export TP="${TP:-1}" PP="${PP:-1}"
export NUM_LAYERS="${NUM_LAYERS:-12}" HIDDEN_SIZE="${HIDDEN_SIZE:-1024}" FFN_HIDDEN_SIZE="${FFN_HIDDEN_SIZE:-2816}"
export NUM_ATTENTION_HEADS="${NUM_ATTENTION_HEADS:-16}" NUM_QUERY_GROUPS="${NUM_QUERY_GROUPS:-4}"
export NUM_EXPERTS="${NUM_EXPERTS:-8}" SEQ_LENGTH="${SEQ_LENGTH:-2048}"
export MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-2}" GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-64}" LR="${LR:-3e-4}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/../mixtral_4x7b_example.sh" "$@"
