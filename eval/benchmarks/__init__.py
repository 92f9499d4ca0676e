"""The benchmarks that come with vcot, a file each; `pipeline.recipe.BENCHMARK_NAMES` lists them."""
