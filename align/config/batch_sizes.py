"""Sizes that a stage works with and that an estimate of its memory counts with. No user sets them. Torch-free."""

CPU_STEP_TOKENS = 8192
"""Prompt tokens that vLLM reads in one step on a CPU at most, or one longer prompt."""
SCORED_AT_ONCE = 32
"""Rows that a reward model reads at a time."""
SAMPLE_CHUNK = 128
"""Prompts that the stage ``sample`` answers between two writes: a killed stage repeats at most these."""
SYNTHESIS_CHUNK = 128
"""Requests that the stage ``synthesize`` answers and keeps together: a killed stage repeats at most these."""
