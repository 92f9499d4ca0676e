"""The benchmarks that come with vcot, a file each; `vcot.pipeline.open_lists.BENCHMARK_NAMES` lists them."""
