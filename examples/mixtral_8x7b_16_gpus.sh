#!/usr/bin/env bash
# Trains a Mixtral 8x7B on two machines of 8 GPUs with 80 GB: TP=4, PP=4. Start it on both:
#
#   CHECKPOINT_PATH=/shared/ckpt TOKENIZER_MODEL=/shared/hf BLENDED_DATA=/shared/data/text_document \
#   MASTER_ADDR=host0 NODE_RANK=0 bash examples/mixtral_8x7b_16_gpus.sh     # NODE_RANK=1 on the other machine
#
# Any variable of mixtral_4x7b_example.sh can be set too; arguments go to pretrain_gpt.py.
set -euo pipefail

export NUM_EXPERTS=8 TP="${TP:-4}" PP="${PP:-4}" NNODES="${NNODES:-2}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/../mixtral_4x7b_example.sh" "$@"
