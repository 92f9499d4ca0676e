"""The base of vcot: records, and the steps that turn tasks into preference data."""
