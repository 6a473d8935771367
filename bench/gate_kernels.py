"""What every kernel is meant to be, by its name."""

from .gate_checks import Meaning

WEIGHT = r"\bw_ptrs? \+"
CACHE = r"\b(keys|values)_ptr \+"
SCORES = r"\brow_ptr \+ start\b"
LISTED = r"\brow_ptr \+ ids\b"
PROBABILITIES = r"\brow_ptr \+ offs\b"
# The assembler gives a load of a position to the maximum that is taken of them.
FLAGS = r"\bword_ptr\b"
ROWS = r"\b(sequence|position|table)_ptr \+|\bword_ptr\b|\b_elementwise_max\b"
TILE = ("BLOCK_N", "CHUNK")

KERNELS = {
    "_enter_kernel": Meaning(),
    "_normalise_kernel": Meaning(streams=r"\bweight_ptr \+", prefetch=("H",)),
    "_weigh_kernel": Meaning(),
    "_linear_kernel": Meaning(streams=WEIGHT, mma=True, prefetch=TILE, known=FLAGS),
    "_qkv_rope_append_kernel": Meaning(streams=WEIGHT, mma=True, prefetch=(2, "PAIRS", "CHUNK"), known=FLAGS),
    "_row_groups_kernel": Meaning(),
    "_attend_kernel": Meaning(streams=CACHE, mma=True, known=ROWS),
    "_merge_splits_kernel": Meaning(known=ROWS),
    "_head_kernel": Meaning(streams=WEIGHT, mma=True, prefetch=TILE),
    "_merge_kernel": Meaning(),
    "_row_map_kernel": Meaning(),
    "_route_kernel": Meaning(streams=WEIGHT, mma=True, prefetch=("BLOCK_N", "BLOCK_K")),
    "_fill_kv_kernel": Meaning(streams=WEIGHT, mma=True),
    "_reshape_logits_kernel": Meaning(streams=SCORES),
    "_partials_kernel": Meaning(streams=SCORES),
    "_sample_kernel": Meaning(streams=LISTED),
    "_logprobs_kernel": Meaning(streams=SCORES),
    "_verify_kernel": Meaning(),
    "_warping_kernel": Meaning(streams=LISTED),
    "_rejection_kernel": Meaning(),
    "_chain_kernel": Meaning(streams=PROBABILITIES),
    "_draw_kernel": Meaning(streams=PROBABILITIES),
    "_compact_kernel": Meaning(),
    "_matches_kernel": Meaning(),
    "_continuation_kernel": Meaning(),
    "_shares_kernel": Meaning(),
    "_vote_kernel": Meaning(),
    "_lineage_kernel": Meaning(),
    "_extend_kernel": Meaning(),
    "_branch_kernel": Meaning(),
    "_commit_kernel": Meaning(),
}
