"""The gateway: one URL for any OpenAI client, stamped answers, verified swaps."""
