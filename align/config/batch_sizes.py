"""Batch sizes that stages use and estimates of memory count with; users do not set them. Torch-free."""

CPU_STEP_TOKENS = 8192
"""Most prompt tokens that vLLM reads in one step on a CPU; a longer prompt gets a separate step."""
SCORED_AT_ONCE = 32
"""Rows that a reward model reads at a time."""
SAMPLE_CHUNK = 128
"""Prompts that the stage ``sample`` answers between two writes: a killed stage repeats at most these."""
SYNTHESIS_CHUNK = 128
"""Requests that the stage ``synthesize`` answers between two writes: a killed stage repeats at most these."""
EPISODES_TOGETHER = 512
"""Episodes that are played at once: as many instances of an environment live at the same time."""
READ_TOKENS = 2048
"""Tokens, padding included, that an evaluation reads in one forward pass, or one longer row."""
