#!/usr/bin/env bash
# Trains a tiny Mixtral on the CPU, with the data that `make demo` has left; its loss falls visibly within minutes.
#
#   make demo && bash examples/laptop.sh
#
# Any variable of mixtral_4x7b_example.sh can be set too; arguments go to pretrain_gpt.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export CHECKPOINT_PATH="${CHECKPOINT_PATH:-$here/demo/laptop}" TOKENIZER_MODEL="${TOKENIZER_MODEL:-$here/demo/hf}"
export BLENDED_DATA="${BLENDED_DATA:-"'$here/demo/data/code_text_document'"}"
export DEVICE=cpu PRECISION="${PRECISION:-fp32}" TP="${TP:-2}" PP="${PP:-1}"
export NUM_LAYERS="${NUM_LAYERS:-4}" HIDDEN_SIZE="${HIDDEN_SIZE:-128}" FFN_HIDDEN_SIZE="${FFN_HIDDEN_SIZE:-256}"
export NUM_ATTENTION_HEADS="${NUM_ATTENTION_HEADS:-8}" NUM_QUERY_GROUPS="${NUM_QUERY_GROUPS:-4}"
export SEQ_LENGTH="${SEQ_LENGTH:-128}" MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-8}"
export GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-32}" TRAIN_ITERS="${TRAIN_ITERS:-100}"
export LR="${LR:-2e-3}" LR_WARMUP_ITERS="${LR_WARMUP_ITERS:-20}"

exec bash "$here/mixtral_4x7b_example.sh" "$@"
