"""The library, without command line, environment or globals. From what a user sees down to what everything stands on:

    models, transformer                   the Mixtral model, its layers, router and experts
    tensor_parallel, context_parallel     split layers and their collectives; attention over split sequences
    pipeline_parallel, stages             schedules and messages between stages; which layers a stage holds
    distributed, optimizer                gradient buffers; masters, AdamW, clipping, learning rates
    fusions                               operations as formulas, and the kernels that run in their place
    microbatch, recompute                 what every layer gets; activations computed again in the backward pass
    parallel_state                        ranks and their groups, which are passed as arguments
    collectives, waiting                  calls that wait for other ranks; what each thread waits for
    datasets, tokenizers                  token files, samples, blends; text to ids
    dist_checkpointing, interchange       training checkpoints of any layout; Megatron's checkpoint folders
    config, config_checks                 frozen dataclasses whose fields are the flags
    atomic_files, text_files              files that are complete or absent; text of files, printed safely
    host_memory                           memory that a run on a CPU keeps

docs/architecture.md says more of each; tests/unit/test_layering.py says and checks what each may import.
"""
