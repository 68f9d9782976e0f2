"""vLLM servers and engines of a cluster: start, calls, pools and balancing."""
