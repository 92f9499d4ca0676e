"""The benchmarks that come with vcot, a file each; `pipeline.open_lists.BENCHMARK_NAMES` lists them."""
