"""Computing: types and their speeds, precision, threads, processes, and estimates of costs."""
