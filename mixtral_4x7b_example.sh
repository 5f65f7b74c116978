#!/usr/bin/env bash
# Trains a Mixtral 4x7B on one machine with 8 GPUs: tensor parallel 4, pipeline parallel 2, a window of 4096 tokens.
#
#   CHECKPOINT_PATH=/ckpt/4x7b TOKENIZER_MODEL=/hf/4x7b \
#   BLENDED_DATA='0.6 /data/web_text_document 0.4 /data/code_text_document' bash mixtral_4x7b_example.sh
#
# Every variable below can be set in the environment; arguments of the script go to pretrain_gpt.py as they are.
# On several machines, start it on each with the same MASTER_ADDR, MASTER_PORT and NNODES, and NODE_RANK=0, 1, ...
# DRY_RUN=1 prints the command instead of running it. With the argument --dry-run RANK/WORLD one process, without torchrun,
# GPUs or data, says what memory that rank of the job needs; then VOCAB_SIZE stands for the tokenizer.
set -euo pipefail

# What must be given.
: "${CHECKPOINT_PATH:=}" # folder that is loaded from and saved to; the converted model, or an empty folder
: "${BLENDED_DATA:=}"    # data set prefixes, each with its weight before it or none with one; quote paths with spaces
: "${TOKENIZER_MODEL:=}" # Hugging Face folder, or a sentencepiece tokenizer.model with TOKENIZER_TYPE=Llama2Tokenizer
: "${TOKENIZER_TYPE:=PretrainedTokenizerFromHF}"

# Device and layout. GPUS_PER_NODE is the number of processes on this machine, on a CPU too.
: "${DEVICE:=auto}"    # auto, cuda or cpu
: "${PRECISION:=bf16}" # bf16, fp16 or fp32
: "${TP:=4}"
: "${PP:=2}"
: "${EP:=1}" # ranks that share out the experts of a layer
: "${MEMORY:=}" # low: the same training in less memory, for some time (docs/memory.md)
: "${SEQUENCE_PARALLEL:=1}" # 0 turns it off
: "${GPUS_PER_NODE:=}"      # TP x PP x EP if not given, at most 8 on GPUs
: "${NNODES:=1}"
: "${NODE_RANK:=0}"
: "${MASTER_ADDR:=localhost}"
: "${MASTER_PORT:=}" # 6000 if not given, on one machine any free port
: "${MAX_RESTARTS:=0}"
: "${NUMA_BINDING:=}" # node, socket, exclusive or core-complex: keeps each process on cores near its GPU (needs numactl)

# The model.
: "${NUM_LAYERS:=32}"
: "${HIDDEN_SIZE:=4096}"
: "${FFN_HIDDEN_SIZE:=14336}"
: "${NUM_ATTENTION_HEADS:=32}"
: "${NUM_QUERY_GROUPS:=8}"
: "${NUM_EXPERTS:=4}"
: "${MOE_ROUTER_TOPK:=2}"
: "${MOE_AUX_LOSS_COEFF:=1e-2}"
: "${SEQ_LENGTH:=4096}"
: "${MAX_POSITION_EMBEDDINGS:=32768}"
: "${ROTARY_BASE:=1000000}"
: "${VOCAB_SIZE:=}" # the tokenizer's if not given (and the checkpoint's with the argument --use-checkpoint-args)

# Training.
: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=128}"
: "${TRAIN_ITERS:=10000}"
: "${LR:=1e-4}"
: "${MIN_LR:=1e-5}"
: "${LR_DECAY_STYLE:=cosine}"
: "${LR_WARMUP_ITERS:=100}"
: "${WEIGHT_DECAY:=0.1}"
: "${CLIP_GRAD:=1.0}"
: "${SPLIT:=969,30,1}"
: "${SEED:=1234}"
: "${LOG_INTERVAL:=1}"
: "${SAVE_INTERVAL:=500}"
: "${EVAL_INTERVAL:=500}"
: "${EVAL_ITERS:=10}"
: "${TENSORBOARD_DIR:=}"
: "${METRICS_PATH:=}"    # file for one JSON line an iteration
: "${DATA_CACHE_PATH:=}" # folder for index files

: "${DRY_RUN:=0}"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

require_whole_numbers() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^[0-9]{1,6}$ ]] || fail "$name must be a whole number, got '${!name}'"
        [[ $name == NODE_RANK || $name == MAX_RESTARTS || $((10#${!name})) -gt 0 ]] || fail "$name must be at least 1"
    done
}

count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ -z $CUDA_VISIBLE_DEVICES || $CUDA_VISIBLE_DEVICES == -1 ]] && { echo 0; return; }
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
    elif [[ -z $torchrun ]]; then
        echo 0
    else
        "$(dirname "$torchrun")/python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0
    fi
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    echo "Settings: $(sed -n 's/^: "\${\([A-Z_]*\):=\([^}]*\)}".*/\1=\2/p' "${BASH_SOURCE[0]}" | tr '\n' ' ')"
    echo "Flags of pretrain_gpt.py: python pretrain_gpt.py --help"
    exit 0
fi

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

dry_run=
for argument in "$@"; do [[ $argument != --dry-run && $argument != --dry-run=* ]] || dry_run=1; done

[[ -n $CHECKPOINT_PATH || -n $dry_run ]] ||
    fail "CHECKPOINT_PATH is not set: name the folder that checkpoints are loaded from and saved to"
[[ $BLENDED_DATA =~ [^[:space:]] || -n $dry_run ]] ||
    fail "BLENDED_DATA is not set: name data sets made by tools/preprocess_data.py, for example '0.6 a_text_document 0.4 b_text_document'"
case $TOKENIZER_TYPE in
PretrainedTokenizerFromHF | Llama2Tokenizer)
    [[ -n $TOKENIZER_MODEL || -n $dry_run && -n $VOCAB_SIZE ]] ||
        fail "TOKENIZER_MODEL is not set${dry_run:+, nor VOCAB_SIZE}: name the tokenizer's Hugging Face folder, or a tokenizer.model with TOKENIZER_TYPE=Llama2Tokenizer"
    [[ -z $TOKENIZER_MODEL || -e $TOKENIZER_MODEL ]] || fail "TOKENIZER_MODEL: there is no '$TOKENIZER_MODEL'"
    ;;
esac
[[ $DEVICE =~ ^(auto|cpu|cuda)$ ]] || fail "DEVICE must be auto, cuda or cpu, got '$DEVICE'"
[[ $PRECISION =~ ^(bf16|fp16|fp32)$ ]] || fail "PRECISION must be bf16, fp16 or fp32, got '$PRECISION'"
[[ $MEMORY =~ ^(|low)$ ]] || fail "MEMORY must be low or empty, got '$MEMORY'"
[[ $NUMA_BINDING =~ ^(|node|socket|exclusive|core-complex)$ ]] ||
    fail "NUMA_BINDING must be node, socket, exclusive or core-complex, got '$NUMA_BINDING'"
require_whole_numbers TP PP EP NNODES NODE_RANK MAX_RESTARTS
if [[ -z $GPUS_PER_NODE ]]; then
    GPUS_PER_NODE=$((TP * PP * EP))
    [[ $DEVICE == cpu || $GPUS_PER_NODE -le 8 ]] || GPUS_PER_NODE=8
fi
require_whole_numbers GPUS_PER_NODE
# NCCL and gloo choose a network by themselves; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name another (docs/clusters.md).
[[ $NNODES == 1 || -n $dry_run || ! $MASTER_ADDR =~ ^(localhost|127\..*|::1)$ ]] ||
    fail "MASTER_ADDR=$MASTER_ADDR is every machine's own name for itself: set it to the address of the first of the $NNODES machines"
((10#$NODE_RANK < 10#$NNODES)) || fail "NODE_RANK=$NODE_RANK is not below NNODES=$NNODES: machines are numbered from 0"
((NNODES * GPUS_PER_NODE % (TP * PP * EP) == 0)) ||
    fail "NNODES x GPUS_PER_NODE = $((NNODES * GPUS_PER_NODE)) processes cannot be divided by TP x PP x EP = $((TP * PP * EP)): change NNODES, GPUS_PER_NODE, TP, PP or EP"

torchrun="$(command -v torchrun || true)"
[[ -n $torchrun || ! -x $here/.venv/bin/torchrun ]] || torchrun="$here/.venv/bin/torchrun"
if [[ $DEVICE != cpu && -z $dry_run ]]; then
    gpus="$(count_gpus)"
    ((gpus >= GPUS_PER_NODE)) ||
        fail "this machine has $gpus GPUs, but $GPUS_PER_NODE processes are to run on it (TP=$TP PP=$PP EP=$EP NNODES=$NNODES GPUS_PER_NODE=$GPUS_PER_NODE): set smaller TP, PP, EP or GPUS_PER_NODE (several machines: NNODES), or train a small model on the CPU with DEVICE=cpu and smaller sizes (NUM_LAYERS, HIDDEN_SIZE, ...)"
    [[ -z $NUMA_BINDING ]] || command -v numactl >/dev/null ||
        fail "NUMA_BINDING=$NUMA_BINDING needs the program numactl: install it, or leave NUMA_BINDING empty"
    # Collectives start in the order they were given, before the kernels that come after them.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Segments that grow: with expert parallelism sizes differ from step to step, and fixed ones would break up memory.
    [[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
    # Compiled kernels on a disk of this machine: a shared home would have all ranks write into one folder. It must be one
    # that nobody else can have filled.
    if [[ -z ${TRITON_CACHE_DIR:-} ]]; then
        cache="${TMPDIR:-/tmp}/triton-$(id -u)"
        mkdir -m 700 "$cache" 2>/dev/null || true
        [[ ! -O $cache || -L $cache ]] || export TRITON_CACHE_DIR="$cache"
    fi
fi
[[ -n $torchrun ]] || fail "there is no torchrun here: run 'make install' in $here, or activate an environment that has torch"

# Of a shared machine a scheduler may have given this job some only.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
threads=$((cores / GPUS_PER_NODE))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# After SIGTERM the ranks finish their step and save; torchrun's own 30 seconds are too few for a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# One path, even with spaces in it, or words that may be quoted.
data=()
if [[ ! $BLENDED_DATA =~ [^[:space:]] ]]; then
    : # of a dry run
elif [[ -e $BLENDED_DATA.idx ]]; then
    data=("$BLENDED_DATA")
else
    words="$(xargs -n 1 printf '%s\n' <<<"$BLENDED_DATA" 2>/dev/null)" ||
        fail "BLENDED_DATA has a quote without its partner: $BLENDED_DATA"
    while IFS= read -r word; do data+=("$word"); done <<<"$words"
fi

# The optimizer is always loaded with the weights: a restart that dropped it would go unnoticed.
tracker="$CHECKPOINT_PATH/latest_checkpointed_iteration.txt"
steps=("$CHECKPOINT_PATH"/iter_*)
if [[ -n $dry_run ]]; then
    : # nothing is loaded
elif [[ -e $tracker ]]; then
    echo "Loading from $CHECKPOINT_PATH: $(head -c 40 "$tracker")"
elif [[ -e ${steps[0]} ]] || [[ -d $CHECKPOINT_PATH/release ]]; then
    echo "Loading from $CHECKPOINT_PATH, which has checkpoints but no latest_checkpointed_iteration.txt"
else
    echo "There is no checkpoint in $CHECKPOINT_PATH yet: starting from fresh weights"
fi

hosts=(--nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
if [[ $NNODES == 1 && -z $MASTER_PORT ]]; then
    # the machine's own name need not resolve, as in many containers
    hosts+=(--standalone --local-addr 127.0.0.1)
else
    hosts+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-6000}")
    # with fixed node ranks only the machine that lost a process would start again; this rendezvous brings all together
    [[ $NNODES == 1 || $MAX_RESTARTS == 0 ]] ||
        hosts+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-6000}" --rdzv-id mixtral)
fi

# Near which GPU a process is, torchrun asks CUDA.
[[ -z $NUMA_BINDING || $DEVICE == cpu ]] || hosts+=(--numa-binding "$NUMA_BINDING")

flags=(
    --device "$DEVICE"
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_ATTENTION_HEADS"
    --num-query-groups "$NUM_QUERY_GROUPS"
    --num-experts "$NUM_EXPERTS"
    --moe-router-topk "$MOE_ROUTER_TOPK"
    --moe-aux-loss-coeff "$MOE_AUX_LOSS_COEFF"
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$MAX_POSITION_EMBEDDINGS"
    --rotary-base "$ROTARY_BASE"
    --tokenizer-type "$TOKENIZER_TYPE"
    --split "$SPLIT"
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-decay-style "$LR_DECAY_STYLE"
    --lr-warmup-iters "$LR_WARMUP_ITERS"
    --weight-decay "$WEIGHT_DECAY"
    --clip-grad "$CLIP_GRAD"
    --seed "$SEED"
    --log-interval "$LOG_INTERVAL"
    --eval-interval "$EVAL_INTERVAL"
    --eval-iters "$EVAL_ITERS"
    --exit-signal-handler
)
[[ -z $CHECKPOINT_PATH ]] || flags+=(--load "$CHECKPOINT_PATH" --save "$CHECKPOINT_PATH" --save-interval "$SAVE_INTERVAL")
((${#data[@]} == 0)) || flags+=(--data-path "${data[@]}")
if [[ $MEMORY == low ]]; then
    # What docs/memory.md says of them: the optimizer shared out and in 16 bits, layers computed twice.
    flags+=(--use-distributed-optimizer --recompute-granularity full --grad-reduce-in-bf16)
    flags+=(--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp16)
    [[ $PRECISION != bf16 ]] || flags+=(--main-params-dtype bf16-remainder)
fi
((EP == 1)) || flags+=(--expert-model-parallel-size "$EP")
[[ $PRECISION == fp32 ]] || flags+=("--$PRECISION")
[[ $SEQUENCE_PARALLEL == 0 || $TP == 1 ]] || flags+=(--sequence-parallel)
[[ -z $TOKENIZER_MODEL ]] || flags+=(--tokenizer-model "$TOKENIZER_MODEL")
[[ -z $VOCAB_SIZE ]] || flags+=(--vocab-size "$VOCAB_SIZE")
[[ -z $TENSORBOARD_DIR ]] || flags+=(--tensorboard-dir "$TENSORBOARD_DIR")
[[ -z $METRICS_PATH ]] || flags+=(--metrics-path "$METRICS_PATH")
[[ -z $DATA_CACHE_PATH ]] || flags+=(--data-cache-path "$DATA_CACHE_PATH")

# tools/launch.py is torchrun without its tracebacks; it needs the interpreter of this torchrun.
launcher=("$torchrun")
interpreter="$(sed -n '1{s/^#! *\(.*python[0-9.]*\)$/\1/p;q;}' "$torchrun" 2>/dev/null || true)"
[[ ! -x $interpreter ]] || launcher=("$interpreter" "$here/tools/launch.py")

command=("${launcher[@]}" "${hosts[@]}")
[[ -z $dry_run ]] || command=("$(dirname "$torchrun")/python")
command+=("$here/pretrain_gpt.py" "${flags[@]}" "$@")
printf '%q ' "${command[@]}"
echo
[[ $DRY_RUN == 0 ]] || exit 0
exec "${command[@]}"
