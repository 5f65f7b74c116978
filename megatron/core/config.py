"""Frozen configuration of the model, the parallel layout, the tokenizer and the data.

Every field is a command-line flag of the same name with dashes; the sentence under it is its help text.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron.core.config_checks import require_divisible, require_finite, require_positive
from megatron.core.stages import Stage, divide_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Mixtral model and the numerics of its layers."""

    num_layers: int = 32
    """Transformer layers in the whole model."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 14336
    """Inner width of one expert."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); the number of query heads if not given."""
    kv_channels: int | None = None
    """Width of one attention head; hidden size / attention heads if not given."""
    max_position_embeddings: int = 32768
    """Longest sequence the model is meant for."""
    rotary_base: float = 10000.0
    """Theta of the rotary position embedding (Mixtral uses 1000000)."""
    norm_epsilon: float = 1e-5
    """Epsilon inside RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of freshly drawn weights."""
    vocab_size: int | None = None
    """Entries of the vocabulary before padding; taken from the tokenizer or the checkpoint if not given."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    num_experts: int = 8
    """Experts in each layer."""
    moe_router_topk: int = 2
    """Experts each token is sent to."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = "aux_loss"
    """What the load-balancing loss is taken over: a microbatch, each sequence, or (by last step's load) a step."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss (times Megatron's E/(K*T^2) formula; a good start is 1e-2)."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach experts on other ranks: each is sent to its experts, or all are sent to all ranks; the result
    is the same."""
    moe_grouped_gemm_backend: Literal["auto", "grouped_mm", "loop"] = "auto"
    """What makes the products of all experts: torch's grouped_mm, a loop of products, or (auto) what is measured to be
    faster when the run begins where torch has one kernel for it (bfloat16 on an H100 or B200) and the loop elsewhere; a
    resumed run goes on with what it began with."""
    moe_grouped_wgrad_backend: Literal["auto", "tiles", "persistent"] = "auto"
    """What adds the weight gradients of all experts to the main gradients on a GPU: a kernel with a program for every
    tile, one whose programs go from tile to tile and need an H100 or B200, or (auto) what is measured to be faster
    when the run begins where there are both; a resumed run goes on with what it began with."""
    moe_expert_capacity_factor: float | None = None
    """Most tokens of a microbatch an expert takes, in multiples of an even share; no token is dropped if not given."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert over its capacity drops: those of lowest probability, or the last of the microbatch."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill up every expert's input to its capacity, so that its shape does not depend on the routing."""
    moe_input_jitter_eps: float | None = None
    """In training, the router sees its input multiplied by uniform noise of 1 plus or minus this; off if not given."""
    moe_z_loss_coeff: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(logits)^2."""
    params_dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of parameters and activations; --bf16 is short for bfloat16, --fp16 for float16."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(
            self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
            "kv_channels", "max_position_embeddings", "rotary_base", "norm_epsilon", "vocab_size",
            "make_vocab_size_divisible_by", "num_experts", "moe_router_topk", "moe_expert_capacity_factor",
        )  # fmt: skip
        if self.kv_channels is None:
            require_divisible("--hidden-size", self.hidden_size, "--num-attention-heads", self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"the attention head width must be even for rotary embeddings, got {self.head_dim}")
        require_divisible("--num-attention-heads", self.num_attention_heads, "--num-query-groups", self.query_groups)
        if self.moe_router_topk > self.num_experts:
            raise ValueError(f"--moe-router-topk ({self.moe_router_topk}) exceeds --num-experts ({self.num_experts})")
        if self.moe_input_jitter_eps is not None and not 0 <= self.moe_input_jitter_eps < 1:
            raise ValueError(f"--moe-input-jitter-eps must be in [0, 1), got {self.moe_input_jitter_eps}")
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            raise ValueError("--moe-pad-expert-input-to-capacity needs --moe-expert-capacity-factor, for instance 1.25")
        if min(self.moe_aux_loss_coeff, self.moe_z_loss_coeff, self.init_method_std) < 0:
            raise ValueError("--moe-aux-loss-coeff, --moe-z-loss-coeff and --init-method-std must not be negative")

    @property
    def output_init_std(self) -> float:
        """`init_method_std` of matrices that write to the residual stream: less in deeper models (GPT-2, Megatron-LM).

        So the variance of the stream does not grow with depth.
        """
        return self.init_method_std / math.sqrt(2 * self.num_layers)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def dtype(self) -> "torch.dtype":
        """`params_dtype` as a torch dtype."""
        import torch  # here, since tools that only know a model's shape would spend most of their time importing it

        dtype: torch.dtype = getattr(torch, self.params_dtype)
        return dtype

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding table: `vocab_size` rounded up so that TP ranks hold equal, aligned parts."""
        assert self.vocab_size is not None, "the vocabulary size is not known yet"
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks divide the model and the data."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each weight matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers into stages (PP)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers in one of several stages that each pipeline rank holds (interleaved schedule)."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages on each pipeline rank (interleaved schedule), instead of the layers in one of them."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline rank, if not an equal share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline rank, if not an equal share."""
    no_overlap_p2p_communication: bool = False
    """In an interleaved pipeline, end every message between stages before the next pass, without overlap."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the experts of a layer (EP)."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's matrices; the tensor-parallel size if not given."""
    context_parallel_size: int = 1
    """Ranks that split the sequence in attention (CP)."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence."""
    use_distributed_optimizer: bool = False
    """Share out masters and moments over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce the gradients of a bucket while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather the parameters of a bucket while the forward pass works on those of the bucket before it; needs
    --use-distributed-optimizer."""
    ddp_bucket_size: int | None = None
    """Elements of a bucket; 40 million, or 1 million times the data-parallel size if that is more, if not given.
    Without --overlap-grad-reduce or --overlap-param-gather there is one bucket."""
    grad_reduce_in_bf16: bool = False
    """Accumulate and reduce the gradients of bfloat16 parameters in bfloat16 instead of float32."""

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
            "expert_tensor_parallel_size", "context_parallel_size", "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers", "ddp_bucket_size",
        )  # fmt: skip
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError(
                "--overlap-param-gather needs --use-distributed-optimizer: add it, or remove --overlap-param-gather"
            )
        self._check_virtual_stages()
        experts_differ = (
            self.expert_model_parallel_size > 1 or self.expert_tensor_parallel != self.tensor_model_parallel_size
        )
        if experts_differ and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise ValueError(
                f"--expert-model-parallel-size {self.expert_model_parallel_size} with --expert-tensor-parallel-size "
                f"{self.expert_tensor_parallel} and --tensor-model-parallel-size {self.tensor_model_parallel_size} "
                "needs --sequence-parallel, so that tensor-parallel ranks hold different tokens: add it"
            )

    def _check_virtual_stages(self) -> None:
        by_layers, by_number = self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank
        if by_layers is None and by_number is None:
            return
        if by_layers is not None and by_number is not None:
            raise ValueError(
                "give --num-layers-per-virtual-pipeline-stage or --num-virtual-stages-per-pipeline-rank, not both"
            )
        if self.pipeline_model_parallel_size == 1 and by_number != 1:
            raise ValueError(
                "virtual pipeline stages need --pipeline-model-parallel-size above 1: raise it, or remove "
                "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank"
            )
        uneven = self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers
        if by_layers is not None and uneven is not None:
            raise ValueError(
                "with --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers, give the virtual "
                "stages by --num-virtual-stages-per-pipeline-rank instead of --num-layers-per-virtual-pipeline-stage"
            )

    @property
    def interleaved(self) -> bool:
        """Whether pipeline ranks may hold several stages."""
        return self.num_layers_per_virtual_pipeline_stage is not None or (
            (self.num_virtual_stages_per_pipeline_rank or 1) > 1
        )

    def stages(self, num_layers: int) -> tuple[tuple[Stage, ...], ...]:
        """The stages of every pipeline rank, `[rank][chunk]`. Raises ValueError if the layers cannot be divided so."""
        ranks, layers = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        chunks = self.num_virtual_stages_per_pipeline_rank or 1
        if layers is not None:
            if num_layers % (ranks * layers):
                raise ValueError(
                    f"--num-layers ({num_layers}) is not divisible by --pipeline-model-parallel-size ({ranks}) x "
                    f"--num-layers-per-virtual-pipeline-stage ({layers}) = {ranks * layers}"
                )
            chunks = num_layers // (ranks * layers)
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        return divide_layers(num_layers, ranks, chunks, first, last)

    @property
    def expert_tensor_parallel(self) -> int:
        """Ranks that split each expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    def bucket_size(self, group_size: int) -> int | None:
        """Elements of a bucket that `group_size` ranks reduce, as in Megatron-LM; None for a single one."""
        if not (self.overlap_grad_reduce or self.overlap_param_gather):
            return None
        return self.ddp_bucket_size or max(40_000_000, 1_000_000 * group_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in `world_size` ranks. Raises ValueError if TP x PP x CP does not divide it."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        if world_size % model:
            raise ValueError(
                f"world size {world_size} is not divisible by tensor ({self.tensor_model_parallel_size}) x pipeline "
                f"({self.pipeline_model_parallel_size}) x context ({self.context_parallel_size}) parallel size "
                f"= {model}: start a multiple of {model} processes or change the layout"
            )
        return world_size // model

    def check_model(self, model: ModelConfig, seq_length: int) -> None:
        """Raises ValueError if heads, layers, experts or the sequence cannot be split evenly over this layout."""
        tp = ("--tensor-model-parallel-size", self.tensor_model_parallel_size)
        require_divisible("--num-attention-heads", model.num_attention_heads, *tp)
        require_divisible("--num-query-groups", model.query_groups, *tp)
        require_divisible(
            "--ffn-hidden-size", model.ffn_hidden_size, "--expert-tensor-parallel-size", self.expert_tensor_parallel
        )
        self.stages(model.num_layers)
        require_divisible(
            "--num-experts", model.num_experts, "--expert-model-parallel-size", self.expert_model_parallel_size
        )
        self._check_sequence(seq_length)

    def _check_sequence(self, seq_length: int) -> None:
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size if self.sequence_parallel else 1
        # each context-parallel rank holds two equal chunks, and splits them together over its tensor-parallel ranks
        multiple = cp * math.lcm(2, tp) if cp > 1 else tp
        if seq_length % multiple:
            parts = [f"2 x --context-parallel-size ({cp})"] if cp > 1 else []
            parts += [f"{'--context-parallel-size x ' if cp > 1 else ''}--tensor-model-parallel-size ({tp})"] * (tp > 1)
            raise ValueError(
                f"--seq-length ({seq_length}) is not divisible by {' and by '.join(parts)}: take a multiple of "
                f"{multiple}"
            )


TokenizerType = Literal["PretrainedTokenizerFromHF", "Llama2Tokenizer", "GPT2BPETokenizer", "NullTokenizer"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer, and where its files are."""

    tokenizer_type: TokenizerType = "PretrainedTokenizerFromHF"
    """Hugging Face folder, sentencepiece model, GPT-2 vocabulary and merges, or none (text is numbers)."""
    tokenizer_model: str | None = None
    """Folder of a Hugging Face tokenizer (or a file in it), or a sentencepiece tokenizer.model."""
    vocab_file: str | None = None
    """vocab.json of a GPT-2 tokenizer."""
    merge_file: str | None = None
    """merges.txt of a GPT-2 tokenizer."""
    trust_remote_code: bool = False
    """Allow a Hugging Face tokenizer to run Python code from its folder."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and in which order."""

    seq_length: int = 4096
    """Tokens in one training sample."""
    data_path: tuple[str, ...] = ()
    """Data set prefixes, each optionally preceded by its weight: 0.6 a_text_document 0.4 b_text_document."""
    data_args_path: str | None = None
    """File that holds the values of --data-path, for long lists."""
    split: str | None = None
    """Shares of documents for training, validation and test; 969,30,1 if not given."""
    train_data_path: tuple[str, ...] = ()
    """Data sets for training only, written like --data-path; instead of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """Data sets for validation only."""
    test_data_path: tuple[str, ...] = ()
    """Data sets for the test at the end only."""
    per_split_data_args_path: str | None = None
    """JSON file with the values of these three flags under the keys train, valid and test."""
    data_cache_path: str | None = None
    """Folder for index files; a folder 'cache' next to the first data set if not given."""
    eod_mask_loss: bool = False
    """Take no loss where the input is an end-of-document token."""
    reset_position_ids: bool = False
    """Count positions from 0 in each document of a sample."""
    reset_attention_mask: bool = False
    """Keep the documents of a sample from seeing each other."""
    mock_data: bool = False
    """Train on generated tokens instead of files."""
    num_workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        require_positive(self, "seq_length")
        if self.num_workers < 0:
            raise ValueError(f"--num-workers must not be negative, got {self.num_workers}")
        self._check_sources()

    def _check_sources(self) -> None:
        """Raises ValueError for flags that say different things of where the data are."""
        names = ("data_path", "data_args_path", "per_split_data_args_path", "mock_data")
        given = {name for name in names if getattr(self, name)}
        if self.train_data_path or self.valid_data_path or self.test_data_path:
            given.add("train_data_path, valid_data_path and test_data_path")
        if len(given) > 1:
            flags = " and ".join("--" + name.replace("_", "-").replace(", ", ", --") for name in sorted(given))
            raise ValueError(f"{flags} exclude each other: give only one of them")
        if (self.valid_data_path or self.test_data_path) and not self.train_data_path:
            raise ValueError("--valid-data-path and --test-data-path need --train-data-path too")
        if self.split is not None and (self.train_data_path or self.per_split_data_args_path):
            raise ValueError(f"--split {self.split} divides --data-path, not data that are given by split: remove it")

    @property
    def is_given(self) -> bool:
        """Whether there is anything to train on."""
        by_file = self.data_args_path or self.per_split_data_args_path
        return bool(self.data_path or self.train_data_path or by_file or self.mock_data)
